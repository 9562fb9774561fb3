"""When to validate: on the sample clock, and at the end."""

from __future__ import annotations

from typing import Any

import lightning as L

from sparsepilot.callbacks.steps import ended_optimizer_step
from sparsepilot.training.module import TrainingModule


class ValidateEvery(L.Callback):
    """Runs Lightning's validation loop after each step that passes a multiple of `every_samples`, and after the last.

    Lightning's own trigger counts batches of the present process. This one counts samples of the run, and acts inside
    `on_train_batch_end`, before the checkpoint callback: a checkpoint never lies between a step and the validation that
    belongs to it.
    """

    def __init__(self, every_samples: int) -> None:
        self.every_samples = every_samples

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validates where it is due."""
        assert isinstance(pl_module, TrainingModule)
        if not ended_optimizer_step(trainer):
            return
        crossed = pl_module.samples // self.every_samples > (pl_module.samples - pl_module.batch) // self.every_samples
        if crossed or pl_module.step >= pl_module.total_steps:
            _run_validation_loop(trainer)


def _run_validation_loop(trainer: L.Trainer) -> None:
    """What Lightning's training loop does when its own trigger fires."""
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
