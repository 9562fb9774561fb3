"""This project's own training path, one step at a time: what train_step.py, side_by_side.py and memory.py share.

A step is what a run does: Lightning's loop fetches a batch from the loader (a real cache, read ahead by its thread),
`TrainingModule` steps, and the callbacks of a run write the step's row. Every step is logged here; a run logs each of
its first 100 steps and every 20th after them. The budget is set far away, so that no latent counts as dead, no
validation or checkpoint comes due, and the learning rate (2e-4) is in the constant part of its schedule.

As a program it is a worker of side_by_side.py: `python benchmarks/stepping.py SETTINGS`, with JSON of `Settings`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from peers.activations import activations, checksum
from peers.worker import Channel, machine
from rich.console import Console

from sparsepilot.building import build_data, build_module, build_trainer
from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.config.check import check
from sparsepilot.config.cli import one_line
from sparsepilot.config.resolvers import register_resolvers
from sparsepilot.config.schema import register
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create, seal
from sparsepilot.process import prepare_process
from sparsepilot.process_memory import ask_for_huge_pages
from sparsepilot.reporting.environment import environment
from sparsepilot.run_folder import RunFolder
from sparsepilot.training.module import TrainingModule
from sparsepilot.training.trainee import Trainee

ask_for_huge_pages()  # as train.py does
ROOT = Path(__file__).resolve().parents[1]
SITE = "activations"
BUDGET_STEPS = 100_000
CALIBRATION_ROWS = 512


@dataclass(frozen=True)
class Settings:
    """What decides a step."""

    model: str = "topk"
    d_in: int = 576
    d_sae: int = 16384
    k: int = 32
    l0: float | None = None
    """calibrate the thresholds so that about so many latents are active per row; None: leave them"""
    batch: int = 4096
    precision: str = "32-true"
    threads: int = 2
    seed: int = 0
    rows: int = 32_768
    """rows of the cache, read again and again"""
    dtype: str = "bfloat16"
    """how the cache stores them"""
    scratch: str = ""
    overrides: list[str] = field(default_factory=list)
    """further Hydra overrides"""

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "scratch"}


def build_step_cache(settings: Settings) -> Path:
    """The cache of these settings under the scratch folder; written where it is not there yet."""
    s = settings
    path = Path(s.scratch).resolve() / f"cache-{s.d_in}x{s.rows}-{s.dtype}-seed{s.seed}"
    plan = CachePlan(s.rows, 0, {SITE: s.d_in}, s.dtype, source={"kind": "step benchmark", "seed": s.seed})
    create(path, plan)
    writer = CacheWriter(path)
    pending = writer.pending()
    if pending:
        x_BD = activations(s.rows, s.d_in, s.dtype, s.seed)
        for part in pending:
            numbers = np.arange(part.start, part.stop)
            writer.write_shard(part, {SITE: x_BD[part.start : part.stop]}, numbers * 0, numbers, numbers * 0)
    seal(path)
    return path


def configure(settings: Settings, cache: Path, run_dir: Path) -> DictConfig:
    """The configuration of a run with these settings, as train.py would see it."""
    s = settings
    register()
    register_resolvers()
    words = [
        f"model={s.model}",
        f"model.d_sae={s.d_sae}",
        "data=cache",
        f"data.path={cache}",
        f"data.sites=[{SITE}]",
        f"samples={BUDGET_STEPS * s.batch}",
        f"batch={s.batch}",
        f"threads={s.threads}",
        f"seed={s.seed}",
        f"trainer.precision={s.precision}",
        "optimizer.lr=2e-4",
        "logger=none",
        "callbacks.log_every_steps=1",
        "callbacks.checkpoint_every_minutes=1e6",
        f"run_dir={run_dir}",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        has_k = "k" in compose("train", words).model
        return compose("train", [*words, *([f"model.k={s.k}"] if has_k else []), *s.overrides])


class Paced(L.Callback):
    """Times whole turns of Lightning's loop and hands over between them.

    A turn goes from one `on_train_batch_end`, after all callbacks of a run, to the next: fetching the batch, the step,
    and the callbacks. `between(seconds, row)` gets the turn's time and its row of metrics, may take its time, which
    belongs to no turn, and says whether to go on. `begin` is called before the first turn.
    """

    def __init__(self, between: Callable[[float, dict[str, Any]], bool], begin: Callable[[], None]) -> None:
        self._between = between
        self._begin = begin
        self._began_s = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the first turn."""
        self._begin()
        self._began_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a turn and starts the next."""
        seconds = time.perf_counter() - self._began_s
        row = cast(TrainingModule, pl_module).train_row or {}
        trainer.should_stop = not self._between(seconds, row)
        self._began_s = time.perf_counter()


class Run:
    """Everything that a run builds, with its thresholds calibrated where that is asked for."""

    def __init__(self, settings: Settings, run_dir: Path) -> None:
        self.settings = settings
        self.cfg = configure(settings, build_step_cache(settings), run_dir)
        check(self.cfg)
        prepare_process(self.cfg)
        run_dir.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(run_dir)
        quiet = Console(quiet=True)
        self.data = build_data(self.cfg, quiet)
        self.module = self.another_module()
        self._log = RunLog(folder, samples=0)
        self.trainer = build_trainer(self.cfg, folder, self._log, quiet, samples=0)

    def another_module(self) -> TrainingModule:
        """The run's module; another call gives one with parameters of its own."""
        module = build_module(self.cfg, self.data)
        if self.settings.l0 is not None:
            calibrate(cast(Trainee, module.trainees["sae"]), self._first_rows(CALIBRATION_ROWS), self.settings.l0)
        return module

    def checksum(self) -> float:
        """Of the first batch of the cache."""
        return checksum(self._first_rows(self.settings.batch))

    def _first_rows(self, num_rows: int) -> torch.Tensor:
        return self.data.cache.read(SITE, 0, min(num_rows, self.settings.rows))

    def fit(self, between: Callable[[float, dict[str, Any]], bool], begin: Callable[[], None] = lambda: None) -> None:
        """Trains until `between` has enough; see `Paced`."""
        callbacks = cast(list[L.Callback], self.trainer.callbacks)  # type: ignore[attr-defined]
        callbacks.append(Paced(between, begin))  # at the end: the others' work belongs to the step
        try:
            self.trainer.fit(self.module, datamodule=self.data)
        finally:
            self._log.close()


@torch.no_grad()
def calibrate(trainee: Trainee, x_BD: torch.Tensor, l0: float) -> float:
    """Moves all thresholds by one number until about `l0` latents per row are active; returns the L0 that it found.

    It is `log_threshold` that moves where there is one, else `b_enc`. The latents that fire are then those that answer
    most, as in a trained dictionary, but nothing here is trained: which rows and latents meet is not as later.
    """
    sae = trainee.autoencoder
    scaled_BD = trainee.scaled(x_BD)[0]
    threshold = getattr(sae, "log_threshold", None)
    moved_F, sign, reach = (sae.b_enc, -1.0, 1e3) if threshold is None else (threshold, 1.0, 30.0)
    start_F = moved_F.clone()

    def found(shift: float) -> float:
        moved_F.copy_(start_F + sign * shift)  # a larger shift makes fewer active
        return float((sae.encode(scaled_BD) != 0).sum(dim=1).double().mean())

    low, high = -reach, reach
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) > l0 else (low, middle)
    reached = found(high)
    if not 0.5 * l0 <= reached <= 2 * l0:
        raise SystemExit(f"--l0 {l0:g}: {sae.architecture} gives {reached:g} however its thresholds are moved")
    return reached


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """Loss and L0 of a step's row."""
    return {"loss": float(row["train/loss"]), "l0": float(row["train/l0"])}


def work(settings: Settings) -> None:
    """A worker: one step of a run for each `go`."""
    channel = Channel()

    def wait() -> None:
        if not channel.told_to_go():
            raise SystemExit(0)

    def between(seconds: float, row: dict[str, Any]) -> bool:
        channel.answer(s=seconds, **metrics_of(row))
        return channel.told_to_go()

    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        try:
            run = Run(settings, Path(folder) / "run")
        except Exception as error:
            line = one_line(error)
            if line is None:
                raise
            channel.answer(error=line)  # a candidate that this version cannot build is a result
            return
        channel.answer(ready=True, checksum=run.checksum(), versions=environment(), machine=machine())
        run.fit(between, wait)


if __name__ == "__main__":
    work(Settings.from_json(sys.argv[1]))
