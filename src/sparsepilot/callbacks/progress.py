"""One line that says where training is: a live bar on a terminal, a plain line every half minute in a log file."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.training.module import TrainingModule

PLAIN_EVERY_S = 30.0


class ProgressLine(L.Callback):
    """Shows samples, speed, loss, L0 and FVU of the last logged step; of several trainees L0 and FVU of each."""

    def __init__(self, log: RunLog, console: Console | None = None) -> None:
        self._log = log
        self._console = console or Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._plain_at_s = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the bar where there is a terminal."""
        assert isinstance(pl_module, TrainingModule)
        self._plain_at_s = time.monotonic()
        if trainer.is_global_zero and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            total = pl_module.total_steps * pl_module.batch
            self._task = self._bar.add_task("train", total=total, completed=pl_module.samples, state="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar, or writes a line when it is time."""
        assert isinstance(pl_module, TrainingModule)
        if not trainer.is_global_zero:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=pl_module.samples, state=self._state(pl_module))
        elif time.monotonic() - self._plain_at_s >= PLAIN_EVERY_S:
            self._plain_at_s = time.monotonic()
            self._console.print("training " + self._state(pl_module), highlight=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error is not drawn over."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _state(self, module: TrainingModule) -> str:
        row = self._log.last_train_row
        total = module.total_steps * module.batch
        parts = [f"{module.samples / 1e6:.2f} / {total / 1e6:.2f}M samples", f"{self._speed(module):,.0f}/s"]
        for prefix, _ in module.each():
            figures = [("train/l0", "L0"), ("train/fvu", "FVU")]
            if not prefix:  # of several, what tells them apart
                figures.insert(0, ("train/loss", "loss"))
            known = [f"{name} {row[prefix + key]:.4g}" for key, name in figures if prefix + key in row]
            parts += known if not prefix else [" ".join([prefix.rstrip("/"), *known])]
        return "  ".join(parts)

    def _speed(self, module: TrainingModule) -> float:
        return self._log.samples_per_s(module.samples)
