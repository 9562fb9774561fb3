"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave; after SIGUSR1 a Slurm job is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from sparsepilot.callbacks.checkpoint import CrashSafeCheckpoint
from sparsepilot.callbacks.steps import ended_optimizer_step
from sparsepilot.parallel.agreement import any_rank
from sparsepilot.run_folder import RunFolder
from sparsepilot.training.module import TrainingModule

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Keeps Lightning 2.6 from handling signals, which `StopAtStep` does.

    On several ranks its handler broadcasts from within the handler, wherever the process stands, and before each
    micro-batch its loop broadcasts a tensor and waits for the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def requeue() -> None:
    """Has Slurm put this job back into its queue; says so first, as Slurm ends what is left of it at once."""
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    print(f"job {job} goes back into the queue", flush=True)
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"job {job} could not be put back into the queue: {error}", flush=True)
        return
    if done.returncode != 0:
        print(f"job {job} could not be put back into the queue: {' '.join(done.stderr.split())}", flush=True)


class StopAtStep(Checkpoint):
    """A signal sets a flag; at the end of the step the ranks agree, save once and exit with status 0.

    SIGUSR1 is what slurm/train.sbatch has Slurm send before the time limit: the job is put back into the queue, once
    for all ranks, and goes on in its own run folder. SIGTERM comes from who wants it to end (or from Slurm, which then
    puts it back by itself).

    Lightning's own handling saves inside the signal handler, in the middle of a step. A second Ctrl-C stops at once, as
    users expect.
    """

    def __init__(self, checkpoint: CrashSafeCheckpoint, folder: RunFolder) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._asked = self._asked_later = False
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes over the signals for as long as training lasts; one that comes before the first step waits for it."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        self._asked_later |= number == signal.SIGUSR1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leaves between two steps, when asked."""
        assert isinstance(pl_module, TrainingModule)
        if not ended_optimizer_step(trainer):
            return
        stop, later = any_rank([self._asked, self._asked_later])
        if stop:
            if self._checkpoint.saved_samples != pl_module.samples:
                self._checkpoint.save(trainer, pl_module)
            self._restore()
            if trainer.is_global_zero:
                where = self._folder.path
                print(f"stopped and saved at {pl_module.samples:,} samples; run_dir={where} goes on there", flush=True)
                if later and "SLURM_JOB_ID" in os.environ:
                    requeue()
            raise SystemExit(0)

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
