"""A trainee: one dictionary in training, with its controller, counters and measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsepilot import losses
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.revival import Resample
from sparsepilot.autoencoders.step import Moment, Step
from sparsepilot.controllers.base import Controller, Measured, Plant
from sparsepilot.errors import CheckpointError
from sparsepilot.metrics.dead import DeadLatents, dead_window_samples
from sparsepilot.ops.readback import Readback
from sparsepilot.parallel.collectives import all_reduce_max_, all_reduce_sum_
from sparsepilot.parallel.shards import whole
from sparsepilot.training.resample import resample
from sparsepilot.types import Batch


class SiteStats(NamedTuple):
    """What training needs to know of a site, from the cache's training rows (raw units)."""

    name: str
    columns: slice
    """where it lies in a batch"""
    mean_D: Tensor
    variance_D: Tensor
    scale: float
    """factor that makes E||x||^2 the site's width"""


class Sites(NamedTuple):
    """What a dictionary reads and what it writes."""

    reads: Sequence[SiteStats]
    writes: Sequence[SiteStats] | None
    """None: what it reads"""


class Measurement(NamedTuple):
    """One optimizer step over the global batch."""

    loss: float
    l0: float
    fvu: float
    terms: dict[str, float]


class Trainee(nn.Module):
    """Everything that belongs to one dictionary of a run.

    Within an optimizer step `forward` runs once per micro-batch and adds to this step's sums; `reduce` merges them over
    ranks; after the parameters have moved, `advance` lets the controller act and closes the step. All state is in the
    module's state dict: parameters, the last firing of each latent, the pending measurement, the controller's numbers.
    """

    scale_in: Tensor
    """[d_in]"""
    scale_out: Tensor
    """[d_out]"""
    mean_out: Tensor
    """[d_out] mean of the targets, in scaled units"""
    mean_sq_residual: Tensor
    sums_S: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder,
        controller: Controller,
        sites: Sites,
        total_samples: int,
        batch: int,
        seed: int = 0,
        lr_at: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.controller = controller
        self.sites = sites
        self.total_samples, self.batch, self.seed = total_samples, batch, seed
        writes = sites.reads if sites.writes is None else sites.writes
        scaled_variance = sum(float(s.variance_D.double().sum()) * float(s.scale) ** 2 for s in writes)
        mean_in, mean_out = (torch.cat([s.mean_D * s.scale for s in side]) for side in (sites.reads, writes))
        autoencoder.initialise(mean_in, mean_out, scaled_variance)
        controller.bind(self._plant(lr_at))
        self.dead = DeadLatents(autoencoder.shard.num_latents, dead_window_samples(total_samples))
        for name, side in (("scale_in", sites.reads), ("scale_out", writes)):
            scale_D = torch.cat([torch.full_like(s.mean_D, s.scale) for s in side])
            self.register_buffer(name, scale_D, persistent=False)
        self.register_buffer("mean_out", mean_out, persistent=False)
        # AuxK's normaliser before the first step: the variance, which is what an empty dictionary leaves
        self.register_buffer("mean_sq_residual", torch.tensor(scaled_variance, dtype=torch.float32))
        # rows, active codes, ||x - mean||^2, loss, then the terms; fp64, so that the order of adding does not show
        num_sums = 4 + len(autoencoder.term_names)
        self.register_buffer("sums_S", torch.zeros(num_sums, dtype=torch.float64), persistent=False)
        self._pending = Readback()
        self._pending_step: Measured | None = None
        # who is dead is settled once per optimizer step: a latent that fires in the first micro-batch is not spared in
        # the second, as it would not be in one big batch
        self._dead_ids_A: Tensor | None = None

    def _plant(self, lr_at: Callable[[int], float] | None) -> Plant:
        nats_per_lr = self.autoencoder.slew_nats_per_lr

        def slew(samples: int) -> float:
            assert lr_at is not None
            assert nats_per_lr is not None
            return nats_per_lr * lr_at(samples) / self.batch

        knob = self.autoencoder.knob
        known = lr_at is not None and nats_per_lr is not None
        return Plant(
            knob.kind, knob.initial, knob.low, knob.high, self.autoencoder.d_sae, self.batch, self.total_samples,
            self.autoencoder.integrates, slew if known else None, knob.steered_by, knob.whole,
        )  # fmt: skip

    def forward(self, x_BD: Tensor, samples: int) -> Tensor:
        """The loss of one micro-batch.

        Args:
            x_BD: [B, D_all] raw activations of all sites of the run.
            samples: the clock after the present global batch.
        """
        x_BD, y_BD = self.scaled(x_BD)
        step = self.autoencoder(x_BD, y_BD, self._now(samples))
        self._measure(y_BD, step, samples)
        return step.loss  # type: ignore[no-any-return]

    def scaled(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, d_in] inputs and [B, d_out] targets in scaled units, from raw rows with all sites of the run."""
        x_in_BD = _columns(x_BD, self.sites.reads) * self.scale_in
        if self.sites.writes is None:
            return x_in_BD, x_in_BD
        return x_in_BD, _columns(x_BD, self.sites.writes) * self.scale_out

    def _now(self, samples: int) -> Moment:
        if self._dead_ids_A is None:
            self._dead_ids_A = self.dead.dead_mask().nonzero().squeeze(1)
        return Moment(
            strength=self.controller.strength,
            samples=samples,
            batch=self.batch,
            total_samples=self.total_samples,
            dead_ids_A=self._dead_ids_A,
            mean_sq_residual=self.mean_sq_residual,
            seed=self.seed,
        )

    @torch.no_grad()
    def _measure(self, y_BD: Tensor, step: Step, samples: int) -> None:
        num_rows = y_BD.shape[0]
        per_row = [step.loss.detach(), *(step.terms.get(name, step.loss.new_zeros(())) for name in self.term_names)]
        self.sums_S += torch.stack(
            [
                torch.tensor(float(num_rows), dtype=torch.float64, device=y_BD.device),
                step.firings_F.sum().double(),
                losses.squared_error(y_BD, self.mean_out.expand_as(y_BD)).double(),
                *(value.double() * num_rows for value in per_row),
            ]
        )
        self.dead.update(step.firings_F, samples)

    @property
    def term_names(self) -> tuple[str, ...]:
        """Loss terms in the order of the sums."""
        return self.autoencoder.term_names

    @torch.no_grad()
    def reduce(self) -> None:
        """Merges this step's sums and firings over ranks: from here on every rank holds the same numbers."""
        self.autoencoder.shard.sum_(self.sums_S[1:2])  # the rest is over all latents already
        all_reduce_sum_(self.sums_S)
        all_reduce_max_(self.dead.last_fired_F)

    def num_dead(self) -> int:
        """Dead latents of the whole dictionary; waits for the device."""
        here = int(self.dead.dead_mask().sum())
        return self.autoencoder.shard.total(here, self.sums_S.device)

    def per_latent(self) -> set[str]:
        """Names in the state dict of what has a row for each latent that this process holds."""
        return {*(f"autoencoder.{name}" for name in self.autoencoder.per_latent), "dead.last_fired_F"}

    def measurement(self) -> Measurement:
        """This step's numbers over the global batch; waits for the device."""
        num_rows, num_active, sq_deviation, loss, *terms = self.sums_S.tolist()
        by_name = {name: value / num_rows for name, value in zip(self.term_names, terms, strict=True)}
        return Measurement(
            loss=loss / num_rows,
            l0=num_active / num_rows,
            fvu=by_name["recon"] * num_rows / sq_deviation,
            terms=by_name,
        )

    def non_finite_term(self) -> str | None:
        """Name of the first loss term of this step that is NaN or infinite; waits for the device."""
        loss, *terms = self.sums_S[3:].tolist()
        for name, value in zip((*self.term_names, "total"), (*terms, loss), strict=True):
            if not math.isfinite(value):
                return f"loss term {name!r}"
        return None

    @torch.no_grad()
    def advance(self, samples: int) -> None:
        """Closes an optimizer step: unit decoder rows, one control action, fresh sums.

        The controller sees the L0 of the step before this one: its copy to the host has had a whole step to arrive.
        """
        self.autoencoder.after_step()
        num_rows = self.sums_S[0]
        means = {name: self.sums_S[4 + i] / num_rows for i, name in enumerate(self.term_names)}
        self.autoencoder.close_step({name: mean.float() for name, mean in means.items()}, self._now(samples))
        self.controller.update(self._take_step(), samples)
        self.mean_sq_residual.copy_(means["recon"])
        fvu = self.sums_S[4] / self.sums_S[2]
        coherence = self.autoencoder.threshold_coherence().double()
        self._pending.begin(torch.stack([self.sums_S[1] / num_rows, fvu, coherence]))
        self._pending_step = None
        self._dead_ids_A = None
        self.sums_S.zero_()

    def _take_step(self) -> Measured | None:
        if self._pending_step is None:
            values = self._pending.take()
            self._pending_step = Measured(*values) if values else None
        return self._pending_step

    @torch.no_grad()
    def revive(self, batches: Sequence[Batch], optimizer: Optimizer, samples: int) -> None:
        """Resamples dead latents where the architecture's revival says that it is time.

        Args:
            batches: this rank's micro-batches of the step just taken.
            optimizer: whose state about the resampled latents is dropped.
            samples: the clock after that step.
        """
        revival = self.autoencoder.revival
        if not isinstance(revival, Resample):
            return
        if not revival.is_due(samples, self.batch, self.total_samples, self.dead.window_samples):
            return
        ids_A = self.dead.dead_mask().nonzero().squeeze(1)
        rows = [self.scaled(batch.x_BD) for batch in batches]
        strength = self.controller.strength
        with whole(self):
            sq_errors = [
                (y_BD - self.autoencoder.evaluate(x_BD, y_BD, strength).y_hat_BD).square().sum(dim=1)
                for x_BD, y_BD in rows
            ]
            rows = [(x_BD - self.autoencoder.b_in, y_BD - self.autoencoder.b_dec) for x_BD, y_BD in rows]
        # stream by stream, as one big batch has them: what is drawn must not hang on how the batch was split
        order_B = _stream_by_stream(len(batches), batches[0].num_streams, len(batches[0].x_BD)).to(ids_A.device)
        xc_BD, yc_BD = (torch.cat(side)[order_B] for side in zip(*rows, strict=True))
        resample(
            self.autoencoder, ids_A, xc_BD, yc_BD, torch.cat(sq_errors)[order_B],
            revival.encoder_scale or self.autoencoder.resampled_encoder_scale, self.seed, samples, optimizer,
        )  # fmt: skip

    @torch.no_grad()
    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """[B, d_out] raw reconstructions, as at inference, of [B, D_all] raw rows with all sites of the run."""
        x_in_BD, y_BD = self.scaled(x_BD)
        return self.autoencoder.evaluate(x_in_BD, y_BD, self.controller.strength).y_hat_BD / self.scale_out

    def observe(self, measurements: Mapping[str, Any], samples: int) -> dict[str, float]:
        """What a validation, or a cross-entropy between two, has found at the clock `samples`; equal on all ranks.
        Returns what the controller adds to that row."""
        return self.controller.observe(measurements, samples)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of this trainee's parameters."""
        return self.autoencoder.parameter_groups()

    def get_extra_state(self) -> dict[str, Any]:
        """Controller numbers and the measurement that it has not seen yet."""
        pending = self._take_step()
        return {"controller": self.controller.state_dict(), "pending_step": None if pending is None else list(pending)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`.

        Raises:
            CheckpointError: when another version of the project wrote it, with other numbers in it.
        """
        try:
            self.controller.load_state_dict(state["controller"])
            pending = state["pending_step"]
            self._pending_step = None if pending is None else Measured(*pending)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint holds another state than {type(self.controller).__name__} has here ({error!r}); "
                "another version of sparsepilot wrote it: end the run with that one, or begin anew with resume=never"
            ) from error
        self._pending = Readback()


def _stream_by_stream(num_batches: int, num_streams: int, num_rows: int) -> Tensor:
    """[num_batches * num_rows] where each stream's rows stand in micro-batches laid end to end, stream after stream.

    >>> _stream_by_stream(2, 2, 4).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return torch.arange(num_batches * num_rows).view(num_batches, num_streams, -1).transpose(0, 1).flatten()


def _columns(x_BD: Tensor, sites: Sequence[SiteStats]) -> Tensor:
    """[B, D] fp32: the columns of some sites side by side."""
    parts = [x_BD[:, site.columns] for site in sites]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).float()
