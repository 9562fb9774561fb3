"""Writes the run's rows: metrics.jsonl (the truth), timing.jsonl, and whatever loggers the user added."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L

from sparsepilot.callbacks.steps import ended_optimizer_step
from sparsepilot.rows import RowFile, rows_of_trainee, rows_up_to
from sparsepilot.run_folder import RunFolder
from sparsepilot.training.module import TrainingModule


class RunLog(L.Callback):
    """Appends each due training row and each validation row.

    Args:
        folder: the run.
        samples: where the run resumes; rows past it are cut.
        waited_s: seconds that training has waited for data so far, for the timing rows.
        after_checkpoint: called with the clock once a checkpoint covers all rows so far (W&B sends them then).
        trainees: their names, where there are several.
    """

    def __init__(
        self,
        folder: RunFolder,
        samples: int,
        waited_s: Callable[[], float] = lambda: 0.0,
        after_checkpoint: Callable[[int], None] = lambda samples: None,
        trainees: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._files: list[RowFile] = []
        """metrics.jsonl and timing.jsonl, on the one rank that writes them"""
        self._trainees = trainees
        rows = map(self._over_all, rows_up_to(folder.metrics, samples))
        self.val_rows = [row for row in rows if "val/loss" in row]
        """Validations; of several trainees, the means over them where all were validated."""
        self.last_train_row: dict[str, Any] = {}
        self._waited_s = waited_s
        self._after_checkpoint = after_checkpoint
        self._began_s = self._last_s = self._validation_began_s = 0.0
        self._last_samples = self._first_samples = samples
        self._last_waited_s = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Opens the files on the one rank that writes them, and cuts them back to where the run resumes."""
        if trainer.is_global_zero and not self._files:
            for path in (self._folder.metrics, self._folder.timing):
                self._files.append(RowFile(path, self._first_samples))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock of the timing rows."""
        self._began_s = self._last_s = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the step's row, where it is due."""
        assert isinstance(pl_module, TrainingModule)
        if not ended_optimizer_step(trainer) or pl_module.train_row is None:
            return
        self.last_train_row = dict(pl_module.train_row)
        self.write(trainer, self.last_train_row)
        self._write_timing(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is not training: its time is left out of samples per second."""
        self._validation_began_s = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the validation's row."""
        assert isinstance(pl_module, TrainingModule)
        if trainer.sanity_checking or pl_module.val_row is None:
            return
        self.val_rows.append(self._over_all(pl_module.val_row))
        self.write(trainer, pl_module.val_row)
        self._last_s += time.monotonic() - self._validation_began_s

    def before_checkpoint(self, module: TrainingModule) -> None:
        """Closes the time that the checkpoint covers, and makes all rows so far durable."""
        if module.samples > self._last_samples:
            self._write_timing(module)
        for file in self._files:
            file.sync()

    def on_checkpoint(self, samples: int) -> None:
        """A checkpoint now covers all rows so far."""
        self._after_checkpoint(samples)

    def samples_per_s(self, samples: int) -> float:
        """Training speed of this process up to the clock `samples`, validation and checkpoints included."""
        return (samples - self._first_samples) / max(1e-9, time.monotonic() - self._began_s)

    def close(self) -> None:
        """Closes both files."""
        for file in self._files:
            file.close()
        self._files.clear()

    @contextmanager
    def apart_from_training(self) -> Iterator[None]:
        """Leaves the time of what is done within out of samples per second."""
        began_s = time.monotonic()
        yield
        self._last_s += time.monotonic() - began_s

    def write(self, trainer: L.Trainer, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl, and its numbers to the user's loggers."""
        if not self._files:
            return
        self._files[0].append(row)
        scalars = {key: value for key, value in row.items() if isinstance(value, int | float)}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=row["step"])

    def _over_all(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, and of each validation figure that all trainees have the mean."""
        if not self._trainees:
            return dict(row)
        own = [next(rows_of_trainee([row], name, self._trainees), {}) for name in self._trainees]
        common = (key for key in own[0] if key.startswith("val/") and all(key in other for other in own))
        numbers = [key for key in common if isinstance(own[0][key], int | float)]
        return {**row, **{key: sum(other[key] for other in own) / len(own) for key in numbers}}

    def _write_timing(self, module: TrainingModule) -> None:
        now_s, waited_s = time.monotonic(), self._waited_s()
        elapsed_s = max(1e-9, now_s - self._last_s)
        row = {
            "step": module.step,
            "samples": module.samples,
            "time": time.time(),
            "elapsed_s": elapsed_s,
            "samples_per_s": (module.samples - self._last_samples) / elapsed_s,
            "data_wait_fraction": (waited_s - self._last_waited_s) / elapsed_s,
        }
        self._last_s, self._last_samples, self._last_waited_s = now_s, module.samples, waited_s
        if self._files:
            self._files[1].append(row)
