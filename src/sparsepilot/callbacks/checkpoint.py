"""When to write a checkpoint, which to keep, and what else must be on disk before it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from sparsepilot.callbacks.checkpoint_io import checkpoint_name, list_checkpoints, point_last_at
from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.callbacks.sharded_io import remove
from sparsepilot.callbacks.steps import ended_optimizer_step
from sparsepilot.parallel.agreement import any_rank
from sparsepilot.training.module import TrainingModule


class CrashSafeCheckpoint(Checkpoint):
    """Writes `samples-<n>.ckpt` every so many minutes or samples, at each best validation and at the end.

    It subclasses Lightning's `Checkpoint` so that it runs after every other callback: what they write for a step
    is there before the checkpoint that covers the step.

    Args:
        folder: where checkpoints go.
        run_log: the run's metrics file; flushed before each checkpoint.
        every_minutes: wall time between checkpoints.
        every_samples: samples between checkpoints, or None for wall time alone.
        keep_last: newest checkpoints to keep (at least 2, so that a damaged one has one before it).
        keep_best: those with the lowest `monitor` at their own validation, kept as well.
        monitor: a key of the validation rows.
    """

    def __init__(
        self,
        folder: Path,
        run_log: RunLog,
        every_minutes: float = 10.0,
        every_samples: int | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        monitor: str = "val/fvu",
    ) -> None:
        self.folder = folder
        self.run_log = run_log
        self.every_s = every_minutes * 60
        self.every_samples = every_samples
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.monitor = monitor
        self._saved_at_s = time.monotonic()
        self.saved_samples = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clears what an earlier process left half-written."""
        assert isinstance(pl_module, TrainingModule)
        self._saved_at_s = time.monotonic()
        self.saved_samples = pl_module.samples
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp"):
                remove(leftover)
            for samples, path in list_checkpoints(self.folder):
                if samples > pl_module.samples:  # found damaged on resume: neither kept as a newest one nor in the way
                    damaged = path.with_name(path.name + ".damaged")
                    remove(damaged)
                    path.rename(damaged)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where one is due."""
        assert isinstance(pl_module, TrainingModule)
        # whatever makes it due, rank 0 decides for all: clocks differ, and it alone is sure to have the rows at hand
        if ended_optimizer_step(trainer) and any_rank([trainer.is_global_zero and self._is_due(pl_module)])[0]:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Writes a checkpoint of this instant, unless its step was not finite."""
        module.refuse_non_finite()
        self.run_log.before_checkpoint(module)
        path = self.folder / checkpoint_name(module.samples)
        trainer.save_checkpoint(path)
        self._saved_at_s = time.monotonic()
        self.saved_samples = module.samples
        if trainer.is_global_zero:
            point_last_at(path)
            self._prune()
        self.run_log.on_checkpoint(module.samples)

    def _is_due(self, module: TrainingModule) -> bool:
        samples = module.samples
        by_time = time.monotonic() - self._saved_at_s >= self.every_s
        by_samples = self.every_samples is not None and samples - self.saved_samples >= self.every_samples
        return by_time or by_samples or module.step >= module.total_steps or self._is_best(samples)

    def _is_best(self, samples: int) -> bool:
        return self.keep_best > 0 and samples in self._best()

    def _best(self) -> list[int]:
        values = {row["samples"]: row[self.monitor] for row in self.run_log.val_rows if self.monitor in row}
        return sorted(values, key=lambda samples: (values[samples], samples))[: self.keep_best]

    def _prune(self) -> None:
        files = list_checkpoints(self.folder)
        keep = {samples for samples, _ in files[: self.keep_last]} | set(self._best())
        for samples, path in files:
            if samples in keep:
                continue
            try:
                remove(path)
            except OSError as error:  # somebody reads it over NFS; it is tried again after the next one
                print(f"warning: an old checkpoint stays: {error}", flush=True)
