"""Disturbs a run once, to see what its controller makes of it."""

from __future__ import annotations

from typing import Annotated, Any, cast

import lightning as L
import torch
from pydantic import Field, PositiveFloat

from sparsepilot.callbacks.steps import ended_optimizer_step
from sparsepilot.training.module import Schedule, TrainingModule
from sparsepilot.training.trainee import Trainee
from sparsepilot.training.validation import Validation

LR_FOR = 0.01
"""Share of the budget, and one step at least."""


class Disturb(L.Callback):
    """After the step that passes `at`, disturbs what is steered (or, with `strength`, what steers).

    Args:
        at: sample of the run.
        total_samples: the budget.
        thresholds: is added to every latent's threshold, in units of scaled pre-activations.
        strength: the controller's strength is multiplied by it.
        data_scale: all inputs from there on are multiplied by it.
        lr: the learning rate is multiplied by it, for 1% of the budget.
    """

    def __init__(
        self,
        at: int,
        total_samples: int,
        thresholds: float = 0.0,
        strength: float = 1.0,
        data_scale: float = 1.0,
        lr: float = 1.0,
    ) -> None:
        self.at, self.thresholds, self.strength, self.data_scale, self.lr = at, thresholds, strength, data_scale, lr
        self.lr_samples = LR_FOR * total_samples
        self._scaled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that resumes behind `at` has its inputs scaled; the rest is in its state, or hangs on the clock."""
        module = cast(TrainingModule, pl_module)
        module.schedules = {name: self._disturbed(one, module.batch) for name, one in module.schedules.items()}
        self._scale_data(module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where nothing was left to train, training has not started, and the dictionary is written all the same."""
        self._scale_data(cast(TrainingModule, pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "lr_samples": self.lr_samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where and how long it was is what it stays: of a longer budget the shares would be others."""
        self.at, self.lr_samples = state_dict["at"], state_dict["lr_samples"]

    def _disturbed(self, undisturbed: Schedule, batch: int) -> Schedule:
        until = self.at + max(self.lr_samples, batch)

        def schedule(samples: int, total_samples: int) -> float:
            return undisturbed(samples, total_samples) * (self.lr if self.at <= samples < until else 1.0)

        return schedule

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Disturbs, once."""
        module = cast(TrainingModule, pl_module)
        if not ended_optimizer_step(trainer) or not module.samples - module.batch < self.at <= module.samples:
            return
        for _, trainee in module.each():
            trainee.autoencoder.shift_thresholds_(self.thresholds)
            trainee.controller.disturb(self.strength)
        self._scale_data(module)

    def _scale_data(self, module: TrainingModule) -> None:
        """Once, behind `at`: what data are scaled by is not in a checkpoint."""
        if self._scaled or module.samples < self.at:
            return
        self._scaled = True
        for name, trainee in module.trainees.items():
            trainee = cast(Trainee, trainee)
            trainee.scale_in.mul_(self.data_scale)
            trainee.scale_out.mul_(self.data_scale)
            trainee.mean_out.mul_(self.data_scale)  # FVU stays about the mean of the data
            cast(Validation, module.validations[name]).fvu.mean_D.mul_(self.data_scale)


def disturbance(
    at: Annotated[float, Field(gt=0, lt=1)],
    thresholds: float = 0.0,
    strength: PositiveFloat = 1.0,
    data_scale: PositiveFloat = 1.0,
    lr: PositiveFloat = 1.0,
) -> None:
    """The signature of `callbacks.disturb`; there `at` is a share of the budget."""
