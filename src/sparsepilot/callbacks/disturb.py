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
"""Share of the budget."""


class Disturb(L.Callback):
    """After the step that passes `at`, disturbs what is steered (or, with `strength`, what steers).

    Args:
        at: sample of the run.
        thresholds: is added to every latent's threshold, in units of scaled pre-activations.
        strength: the controller's strength is multiplied by it.
        data_scale: all inputs from there on are multiplied by it.
        lr: the learning rate is multiplied by it, for 1% of the budget.
    """

    def __init__(
        self,
        at: int,
        thresholds: float = 0.0,
        strength: float = 1.0,
        data_scale: float = 1.0,
        lr: float = 1.0,
    ) -> None:
        self.at, self.thresholds, self.strength, self.data_scale, self.lr = at, thresholds, strength, data_scale, lr

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that resumes behind `at` has its inputs scaled; the rest is in its state, or hangs on the clock."""
        module = cast(TrainingModule, pl_module)
        module.schedules = {name: self._disturbed(schedule) for name, schedule in module.schedules.items()}
        if module.samples >= self.at:
            self._scale_data(module)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where it was is where it stays: with a longer budget the share would be another place."""
        self.at = state_dict["at"]

    def _disturbed(self, undisturbed: Schedule) -> Schedule:
        def schedule(samples: int, total_samples: int) -> float:
            for_now = self.at <= samples < self.at + LR_FOR * total_samples
            return undisturbed(samples, total_samples) * (self.lr if for_now else 1.0)

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
