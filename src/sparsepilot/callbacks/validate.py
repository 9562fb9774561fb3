"""When to validate, and when to run the language model in between: on the sample clock, and at the end."""

from __future__ import annotations

from typing import Any

import lightning as L

from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.callbacks.steps import ended_optimizer_step
from sparsepilot.training.module import TrainingModule


class ValidateEvery(L.Callback):
    """Runs Lightning's validation loop after each step that passes a multiple of `every_samples`, after the last, and
    where a controller wants it: of the one trainee that it steers, so that the others go on as if they were alone.

    Lightning's own trigger counts batches of the present process. This one counts samples of the run, and acts inside
    `on_train_batch_end`, before the checkpoint callback: a checkpoint never lies between a step and the validation that
    belongs to it.

    Args:
        every_samples: between validations.
        log: takes the rows of measurements in between.
        cross_entropy_every_samples: between measurements of the language model's cross-entropy, of which each
            validation is one; None: at validations alone.
    """

    def __init__(self, every_samples: int, log: RunLog, cross_entropy_every_samples: int | None = None) -> None:
        self.every_samples = every_samples
        self.cross_entropy_every_samples = cross_entropy_every_samples
        self._log = log

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validates where it is due."""
        assert isinstance(pl_module, TrainingModule)
        if not ended_optimizer_step(trainer):
            return
        wanted, names = pl_module.want_validation(), list(pl_module.trainees)
        if _crossed(pl_module, self.every_samples) or pl_module.step >= pl_module.total_steps:
            wanted = names
        if wanted:
            pl_module.to_validate = wanted
            with pl_module.whole(wanted):
                _run_validation_loop(trainer)
        rest = [name for name in names if name not in wanted and pl_module.measures_cross_entropy(name)]
        if rest and self.cross_entropy_every_samples and _crossed(pl_module, self.cross_entropy_every_samples):
            with self._log.apart_from_training(), pl_module.whole(rest):
                self._log.write(trainer, pl_module.measure_cross_entropy(rest))


def _crossed(module: TrainingModule, every_samples: int) -> bool:
    """Whether the step just taken passed a multiple of `every_samples`."""
    return module.samples // every_samples > (module.samples - module.batch) // every_samples


def _run_validation_loop(trainer: L.Trainer) -> None:
    """What Lightning's training loop does when its own trigger fires."""
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
