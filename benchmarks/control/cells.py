"""The settings that all of them share, and one run of train.py in them."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from sparsepilot.controllers.penalty_knob import BEGIN
from sparsepilot.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "relu": ["model=relu"],
    "relu tanh": ["model=relu", "model.penalty=tanh"],
    "jumprelu": ["model=jumprelu"],
    "jumprelu wide": ["model=jumprelu", "model.recipe=tanh"],
    "gated": ["model=gated"],
    "batchtopk": ["model=batchtopk"],
    "matryoshka": ["model=matryoshka"],
}
PENALTIES = ("relu", "relu tanh", "jumprelu", "jumprelu wide", "gated")
DATA = {
    "planted": [
        "data=synthetic", "data.path={scratch}/planted", "data.build.d_in=256", "data.build.num_features=512",
        "data.build.mean_active=16", "data.build.noise=0.1", "model.d_sae=512", "samples=1_536_000", "batch=512",
        "optimizer.lr=2e-3",
    ],
    "demo": ["data.path={cache}", "model.d_sae=2048", "samples=1_228_800", "batch=512", "optimizer.lr=1e-3"],
}  # fmt: skip
"""The planted data are this project's, at 256 dimensions, 512 features, 16 of them active; the demo's the README's."""
VALIDATIONS = 50
"""Of a run with a k. Its L0 in training is what was set; whether control arrives, the L0 of held-out rows says."""


class Where(NamedTuple):
    """What a campaign is told on its command line."""

    scratch: Path
    cache: Path
    threads: int
    hold: Path | None
    table: bool
    """nothing is run"""

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--scratch", type=Path, required=True, help="folder of the runs and results, resumable")
        parser.add_argument("--cache", type=Path, default=ROOT / "cache" / "demo")
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--hold", type=Path, default=None, help="no run begins while this file exists")
        parser.add_argument("--table", action="store_true", help="the table of what is there; runs nothing")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Where:
        scratch = args.scratch.resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        return cls(scratch, args.cache, args.threads, args.hold, args.table)


def words_of(where: Where, data: str, model: str) -> list[str]:
    """Overrides of train.py for a model on some data."""
    return [word.format(scratch=where.scratch, cache=where.cache) for word in DATA[data]] + MODELS[model]


def judged_by(model: str) -> str:
    """What of a run's rows is the L0 that is judged: the loop's own reckoning of it, or what validations found."""
    return "controller/measured" if model in PENALTIES else "val/l0"


def validated(model: str, samples: int) -> list[str]:
    """Overrides that have a run with a k validated often enough to be judged."""
    return [] if model in PENALTIES else [f"callbacks.validate_every_samples={samples // VALIDATIONS}"]


def samples_of(words: Iterable[str]) -> int:
    """The budget that overrides name last.

    >>> samples_of(["samples=1_536_000", "batch=512"])
    1536000
    """
    return int([word.partition("=")[2] for word in words if word.startswith("samples=")][-1])


def initial_strength(model: str, start: float) -> list[str]:
    """The override that makes a penalty begin at `start` times its default strength."""
    if model not in PENALTIES or start == 1.0:
        return []
    node = OmegaConf.load(ROOT / "conf" / "model" / f"{model.split()[0]}.yaml")
    return [f"controller.initial_strength={start * BEGIN * node['coefficient']:.4g}"]


def there(where: Where, name: str, words: list[str]) -> bool:
    """Trains this run unless it is there, or only the table of what is there is wanted; whether it is there now."""
    summary = where.scratch / name / "summary.json"
    if not summary.exists() and not where.table:
        train(where, name, words)
    return summary.exists()


def train(where: Where, name: str, words: list[str]) -> float:
    """Runs train.py, or goes on with it, in the run folder `name`; returns seconds."""
    while where.hold and where.hold.exists():
        time.sleep(2)
    run_dir, began_s = where.scratch / name, time.perf_counter()
    # at a constant rate L0 of held-out rows moves by 2% between validations, which no coefficient controls
    fixed = ["schedule=warmup_stable_decay", "logger=none", "report=false", "callbacks.log_every_steps=1"]
    fixed.append(f"threads={where.threads}")
    with (where.scratch / f"{name}.txt").open("w", encoding="utf-8") as file:
        quiet = {**os.environ, "OMP_NUM_THREADS": str(where.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, str(ROOT / "train.py"), *words, *fixed, f"run_dir={run_dir}"]
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=quiet, check=True)
    return time.perf_counter() - began_s


def rows_of(where: Where, name: str) -> list[dict[str, Any]]:
    """The rows that a run has logged."""
    return list(read_rows(where.scratch / name / "metrics.jsonl"))


def parts_of(rows: Iterable[Mapping[str, Any]], key: str, width_samples: float) -> dict[int, list[float]]:
    """The values of `key` in equal stretches of a run, by their number; a step belongs where its samples were read.

    >>> parts_of([{"samples": 4, "l0": 9.0}, {"samples": 8, "l0": 7.0}, {"samples": 8}], "l0", 4)
    {0: [9.0], 1: [7.0]}
    """
    parts: dict[int, list[float]] = {}
    for row in rows:
        if key in row:
            parts.setdefault(int((row["samples"] - 1) / width_samples), []).append(row[key])
    return parts


def last_of(where: Where, name: str) -> dict[str, Any]:
    """The last validation of a run."""
    return [row for row in rows_of(where, name) if "val/l0" in row][-1]


def interpolated(points: Iterable[tuple[float, float]], x: float) -> float:
    """y at x between (x, y) points, linear in logarithms; NaN outside of them.

    >>> round(interpolated([(10, 0.4), (40, 0.1)], 20), 6)
    0.2
    """
    for (low, y_low), (high, y_high) in pairwise(sorted(points)):
        if low <= x <= high:
            share = math.log(x / low) / math.log(high / low)
            return float(y_low ** (1 - share) * y_high**share)
    return math.nan
