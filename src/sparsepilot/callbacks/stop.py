"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave; where Slurm has asked for it, queue the job again."""

from __future__ import annotations

import signal
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from sparsepilot import slurm
from sparsepilot.callbacks.checkpoint import CrashSafeCheckpoint
from sparsepilot.callbacks.steps import ended_optimizer_step
from sparsepilot.parallel.agreement import any_rank
from sparsepilot.run_folder import RunFolder
from sparsepilot.training.module import TrainingModule


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Keeps Lightning 2.6 from handling signals, which `StopAtStep` does.

    On several ranks its handler broadcasts from within the handler, wherever the process stands, and before each
    micro-batch its loop broadcasts a tensor and waits for the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class StopAtStep(Checkpoint):
    """A signal sets a flag; at the end of the step the ranks agree, save once and exit with status 0 (with 128 and the
    signal where the job should go back into its queue, and Slurm does not take it).

    The signal that Slurm sends before a time limit (SIGUSR1 for slurm/train.sbatch, SIGUSR2 under submitit), or SIGTERM
    where Slurm needs the room: the job is put back into the queue, once for all ranks, and goes on in its own run
    folder. SIGTERM otherwise comes from who wants it to end.

    Lightning's own handling, and submitit's, act inside the signal handler, in the middle of a step. A second Ctrl-C
    stops at once, as users expect.
    """

    def __init__(self, checkpoint: CrashSafeCheckpoint, folder: RunFolder) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._asked: set[int] = set()
        self._before: dict[signal.Signals, Any] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Takes over the signals for as long as training lasts, once the first batch is here.

        What lies before it (a cache to build, a checkpoint to read, a language model's first activations) may last
        longer than Slurm waits for a job that was asked to leave, and there is nothing to save in it.
        """
        if self._before:
            return
        for number in slurm.stop_signals():
            self._before[number] = signal.signal(number, self._handle)
        self._asked.update(slurm.asked_early)

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.add(number)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leaves between two steps, when asked."""
        assert isinstance(pl_module, TrainingModule)
        if not ended_optimizer_step(trainer):
            return
        numbers = slurm.stop_signals()
        asked = any_rank([number in self._asked for number in numbers])
        if not any(asked):
            return
        if self._checkpoint.saved_samples != pl_module.samples:
            self._checkpoint.save(trainer, pl_module)
        slurm.ignore(*(number for number in numbers if number != signal.SIGINT))
        status = 0
        if trainer.is_global_zero:
            where = self._folder.path
            print(f"stopped and saved at {pl_module.samples:,} samples; run_dir={where} goes on there", flush=True)
            back = [number for number, was in zip(numbers, asked, strict=True) if was and slurm.belongs_back(number)]
            if back:
                slurm.requeue()
                status = 0 if slurm.queued_again else 128 + back[0]  # or nobody would start it again
        if slurm.job() is not None:
            self._before.clear()  # the others of the job are ended by Slurm: a late signal must not be an error here
        raise SystemExit(status)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the signals back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
