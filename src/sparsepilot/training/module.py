"""The LightningModule: one optimizer step of every trainee, on one clock that counts samples."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sparsepilot import faults
from sparsepilot.errors import CheckpointError, NonFiniteError
from sparsepilot.ops.readback import Readback
from sparsepilot.parallel.agreement import any_rank, from_all
from sparsepilot.parallel.mesh import features
from sparsepilot.parallel.sharded import Sharded
from sparsepilot.parallel.shards import own, scale_down_, whole
from sparsepilot.training.streams import loss_stream_by_stream
from sparsepilot.training.trainee import Trainee
from sparsepilot.training.validation import Row, Validation
from sparsepilot.types import Batch

Schedule = Callable[[int, int], float]
"""(samples, total_samples) -> learning rate"""

LOG_EACH_OF_FIRST_STEPS = 100


class TrainingModule(L.LightningModule):
    """Trains one or more trainees on the same stream of activations.

    Args:
        trainees: by name; with one alone, metric keys drop its name.
        validations: the held-out measurement of each trainee, under the same names.
        optimizer: makes the optimizer from parameter groups; a group's `lr_scale` multiplies the schedule.
        schedules: of each trainee, the learning rate at a place on the sample clock.
        batch: rows per optimizer step, over all ranks and micro-batches.
        total_samples: the budget.
        clip_norm: each trainee's gradient is scaled down to this norm; None leaves it.
        reproducible: the same bits on 1, 2, 4, ... ranks (training/streams.py).
        log_every_steps: a row of training metrics every so many steps, and at each of the first 100 and the last.
    """

    def __init__(
        self,
        trainees: dict[str, Trainee],
        validations: dict[str, Validation],
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        schedules: Mapping[str, Schedule],
        batch: int,
        total_samples: int,
        clip_norm: float | None = None,
        log_every_steps: int = 50,
        reproducible: bool = False,
    ) -> None:
        super().__init__()
        self.trainees = nn.ModuleDict(trainees)
        self.validations = nn.ModuleDict(validations)
        self._make_optimizer = optimizer
        self.schedules = dict(schedules)
        self.batch = batch
        self.total_samples = total_samples
        self.clip_norm = clip_norm
        self.log_every_steps = log_every_steps
        self.reproducible = reproducible
        self.samples = 0
        """The clock: rows that the parameters have been trained on, over all ranks. A Python int, never a float."""
        self.train_row: Row | None = None
        """Metrics of the optimizer step just taken, where they are due."""
        self.val_row: Row | None = None
        """Metrics of the last validation."""
        self.to_validate: Collection[str] = tuple(trainees)
        """Names of the trainees that the next validation is of."""
        self._micro_batches: list[Batch] = []
        self._health = Readback()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.samples // self.batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run: the budget, rounded up to whole batches."""
        return -(-self.total_samples // self.batch)

    def each(self) -> Iterator[tuple[str, Trainee]]:
        """(key prefix, trainee) pairs; the prefix is empty where there is one trainee."""
        for name, trainee in self.trainees.items():
            yield ("" if len(self.trainees) == 1 else f"{name}/"), cast(Trainee, trainee)

    # ------------------------------------------------------------------------------------------------ one step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch: the sum of the trainees' losses (they share no parameter)."""
        self._micro_batches.append(batch)
        if self.reproducible:
            return loss_stream_by_stream([trainee for _, trainee in self.each()], batch, self.samples + self.batch)
        losses = [trainee(batch.x_BD, self.samples + self.batch) for _, trainee in self.each()]
        return torch.stack(losses).sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """All gradients of the global batch are there: merge the measurements, refuse NaN, project and clip."""
        vitals = []
        for _, trainee in self.each():
            trainee.reduce()
            trainee.autoencoder.project_gradients()
            norm = trainee.autoencoder.gradient_norm()
            if self.clip_norm is not None:
                gradients = [p.grad for p in trainee.autoencoder.parameters() if p.grad is not None]
                scale_down_(gradients, norm, self.clip_norm)
            vitals += [norm.double(), trainee.sums_S.sum()]
        if self.device.type == "cpu":  # the numbers are here: stop before the step spoils the parameters
            self._health.begin(torch.stack(vitals))
            self.refuse_non_finite()
        else:  # look at the last step's numbers; a checkpoint is written only after its own step was looked at
            self.refuse_non_finite()
            self._health.begin(torch.stack(vitals))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Sets the learning rate from the clock, steps, then moves the clock and the controllers.

        All of it happens before any callback sees the end of the step, so a checkpoint never holds half a step.
        """
        lrs = {name: schedule(self.samples, self.total_samples) for name, schedule in self.schedules.items()}
        for group in optimizer.param_groups:
            lr = lrs[group.get("trainee", next(iter(lrs)))]
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step(closure=optimizer_closure)  # runs the micro-batch's forward and backward, too
        faults.point("mid-step")
        self.samples += self.batch
        self.train_row = self._make_train_row(lrs) if self._row_is_due() else None
        for _, trainee in self.each():
            trainee.advance(self.samples)
            trainee.revive(self._rows_to_measure(), _inner(optimizer), self.samples)
        self._micro_batches.clear()

    def _rows_to_measure(self) -> list[Batch]:
        """This step's rows, cut as the step has cut them."""
        if not self.reproducible:
            return self._micro_batches
        return [Batch(x, b.first_sample) for b in self._micro_batches for x in b.x_BD.chunk(b.num_streams)]

    def configure_model(self) -> None:
        """Before there is an optimizer: spreads the trainees over ranks, where the trainer is one that does."""
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded) and not self.is_spread():
            for _, trainee in self.each():
                strategy.shard(trainee)

    def is_spread(self) -> bool:
        """Whether parameters are spread over ranks."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters())

    @contextlib.contextmanager
    def whole(self, names: Collection[str]) -> Iterator[None]:
        """Within it every rank can read all parameters of these trainees, as a validation does: gathered once, where
        they are spread."""
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(whole(self.trainees[name]))
            yield

    def configure_optimizers(self) -> Optimizer:
        """One optimizer; each trainee's parameters are groups of their own."""
        groups = []
        for name, trainee in self.trainees.items():
            named = {"trainee": name} if len(self.trainees) > 1 else {}
            groups += [{**group, **named} for group in _trainee(trainee).parameter_groups()]
        return self._make_optimizer(groups)

    # ------------------------------------------------------------------------------------------------ validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch of held-out rows to the validations."""
        for name in self.to_validate:
            cast(Validation, self.validations[name]).update(batch.x_BD)

    def on_validation_epoch_end(self) -> None:
        """Closes the validation into `val_row`."""
        last = self.step >= self.total_steps
        self.val_row = self._observed(self.to_validate, lambda validation: validation.finish(self.samples, last))

    def want_validation(self) -> list[str]:
        """The trainees whose controllers need a validation after the step just taken. To be asked once a step."""
        return [n for n, t in self.trainees.items() if _trainee(t).controller.wants_validation(self.samples)]

    def measures_cross_entropy(self, name: str) -> bool:
        """Whether the language model is run with this trainee's reconstruction."""
        return cast(Validation, self.validations[name]).measures_cross_entropy

    def measure_cross_entropy(self, names: Collection[str]) -> Row:
        """A row of the language model's figures alone, between two validations of these trainees."""
        return self._observed(names, lambda validation: validation.cross_entropy(often=True))

    def _observed(self, names: Collection[str], measure: Callable[[Validation], Row]) -> Row:
        """The row of a measurement of some trainees, each of whom hears of its own."""
        row = self.clock()
        for name, (prefix, trainee) in zip(self.trainees, self.each(), strict=True):
            if name not in names:
                continue
            own = measure(cast(Validation, self.validations[name]))
            own |= trainee.observe(own, self.samples)
            row |= {prefix + key: value for key, value in own.items()}
        return row

    # ------------------------------------------------------------------------------------------------ rows

    def clock(self) -> Row:
        """What every row begins with. A token is a sample here: one position, all sites that are read there."""
        return {"step": self.step, "samples": self.samples, "tokens": self.samples}

    def _row_is_due(self) -> bool:
        step = self.step
        return step <= LOG_EACH_OF_FIRST_STEPS or step % self.log_every_steps == 0 or step >= self.total_steps

    def _make_train_row(self, lrs: Mapping[str, float]) -> Row:
        row = self.clock()
        for lr, (prefix, trainee) in zip(lrs.values(), self.each(), strict=True):
            measured = trainee.measurement()
            row[f"{prefix}train/loss"] = measured.loss
            for name, value in measured.terms.items():
                row[f"{prefix}train/loss_{name}"] = value
            row[f"{prefix}train/l0"] = measured.l0
            row[f"{prefix}train/fvu"] = measured.fvu
            row[f"{prefix}train/dead_latents"] = trainee.num_dead()
            row |= {f"{prefix}controller/{name}": value for name, value in trainee.controller.readings().items()}
            row[f"{prefix}train/lr"] = lr
        return row

    # ------------------------------------------------------------------------------------------------ NaN

    def refuse_non_finite(self) -> None:
        """Raises NonFiniteError where the step last looked at had a NaN or infinite loss or gradient."""
        vitals = self._health.take()
        if vitals is None or all(abs(v) < float("inf") for v in vitals):
            return
        where = f"step {self.step + 1}, samples {self.samples} to {self.samples + self.batch}"
        for prefix, trainee in self.each():
            term = trainee.non_finite_term()
            if term is None:
                names, parameters = zip(*trainee.autoencoder.named_parameters(), strict=True)
                # a part of a gradient may lie on another rank
                flags = any_rank([_has_non_finite(p.grad) for p in parameters])
                bad = [name for name, flag in zip(names, flags, strict=True) if flag]
                if not bad:
                    continue
                term = "gradient of " + ", ".join(bad)
            raise NonFiniteError(f"{prefix.replace('/', ': ')}{term} is not finite at {where}; {self._bad_rows()}")
        raise NonFiniteError(f"a loss or gradient was not finite just before {where}")

    def _bad_rows(self) -> str:
        """Which rows of this step's micro-batches, on any rank, hold NaN or infinity, or that the input is clean."""
        name_rows = getattr(self.trainer.train_dataloader, "cache_rows", None)
        found: list[str] = []
        for number, batch in enumerate(self._micro_batches):
            rows = (~torch.isfinite(batch.x_BD).all(dim=1)).nonzero().flatten().tolist()
            if name_rows is not None:
                found += [f"cache row {row}" for row in name_rows(batch.first_sample, number, rows)]
            else:
                found += [f"row {row} of micro-batch {number}" for row in rows]
        found = list(dict.fromkeys(row for rows in from_all(found) for row in rows))
        if not found:
            return "every input row is finite, so the parameters or the learning rate are to blame"
        return "not finite in the input: " + ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")

    # ------------------------------------------------------------------------------------------------ saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The clock is all that the loops need: Lightning's own loop counters are left out and rebuilt from it."""
        checkpoint["sparsepilot"] = {
            "samples": self.samples,
            "batch": self.batch,
            "made_with": self._made_with(),
            "architectures": {name: _trainee(t).autoencoder.architecture for name, t in self.trainees.items()},
            "shapes": self._shapes(),
        }
        checkpoint.pop("loops", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other dictionaries before any tensor is copied."""
        saved = checkpoint.get("sparsepilot")
        if saved is None:
            raise CheckpointError("the checkpoint holds no sparsepilot clock; it was written by another program")
        for name, trainee in self.trainees.items():
            theirs = saved["architectures"].get(name)
            ours = _trainee(trainee).autoencoder.architecture
            if theirs != ours:
                raise CheckpointError(
                    f"the checkpoint's {name!r} is a {theirs}, this run's is a {ours}: use the same model"
                )
        for name, shape in self._shapes().items():
            theirs = saved["shapes"].get(name)
            if theirs != shape:
                raise CheckpointError(
                    f"the checkpoint's {name} has shape {theirs}, this run's has {shape}: use the same model"
                )
        self.samples = saved["samples"]
        made_with = self._made_with()
        differing = [f"{k} was {v}, is {made_with[k]}" for k, v in saved["made_with"].items() if v != made_with[k]]
        if differing and self.trainer.is_global_zero:
            warnings.warn(
                "resuming with the same order of data but not the same bits: " + "; ".join(differing), stacklevel=1
            )

    def per_latent(self) -> set[str]:
        """Names in the state dict of what has a row for each latent that this process holds."""
        return {f"trainees.{name}.{own}" for name, t in self.trainees.items() for own in _trainee(t).per_latent()}

    def _shapes(self) -> dict[str, list[int]]:
        """Of the parameters of whole dictionaries."""
        num_shards, rows = features().size, self.per_latent()
        return {
            name: [p.shape[0] * (num_shards if name in rows else 1), *p.shape[1:]]
            for name, p in self.named_parameters()
        }

    def _made_with(self) -> dict[str, str | int]:
        """What the bits of a step depend on beside configuration and state."""
        device = self.trainer.strategy.root_device
        return {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "ranks": self.trainer.world_size,
            "parameters": "spread over ranks" if self.is_spread() else "whole",
            "shards": features().size,
            "accumulate": self.trainer.accumulate_grad_batches,
            "precision": str(self.trainer.precision),
            "reproducible": str(self.reproducible),
            "paths": "; ".join(sorted({trainee.autoencoder.paths() for _, trainee in self.each()})),
        }

    def on_train_start(self) -> None:
        """Tells Lightning how many steps lie behind, so that `trainer.global_step` continues."""
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = self.step


def _trainee(module: nn.Module) -> Trainee:
    return cast(Trainee, module)


def _inner(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _has_non_finite(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(torch.isfinite(own(gradient)).all())
