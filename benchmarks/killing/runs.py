"""The small run that gets killed, and one kill of it: start, die, and whether it died and went on as it should have."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from killing.compare import run_differences
from sparsepilot.callbacks.checkpoint_io import is_whole, list_checkpoints
from sparsepilot.rows import read_rows

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH, STEPS, SAVE_STEPS, VALIDATE_STEPS = 256, 120, 10, 20
BASE = (
    "data=synthetic",
    *("data.build.num_rows=20000", "data.build.num_val_rows=1024", "data.build.d_in=16"),
    *("data.build.num_features=64", "data.build.mean_active=4", "data.build.power=1.0"),
    *("data.num_streams=16", "data.val_batch=512"),
    # far more latents than features, so that some are dead and AuxK acts: a lost counter must show
    *("model.d_sae=512", "model.k=4", "model.revival.aux_k=8"),
    *("controller._target_=killing.targets.SteppedK", "schedule=cosine", "schedule.warmup_samples=4096"),
    *("schedule._target_=killing.targets.cosine", "~schedule.final_factor"),
    *(f"batch={BATCH}", f"samples={BATCH * STEPS}", "logger=none", "report=false", "callbacks.log_every_steps=5"),
    *(f"callbacks.checkpoint_every_samples={BATCH * SAVE_STEPS}", "callbacks.checkpoint_every_minutes=1000"),
    f"callbacks.validate_every_samples={BATCH * VALIDATE_STEPS}",
)

SEVERAL = (
    "+trainees.wide.model.d_sae=768",
    *("+model@trainees.jump.model=jumprelu", "trainees.jump.model.d_sae=256"),
    *("+controller@trainees.jump.controller=l0_target", "trainees.jump.controller.target_l0=6"),
)
"""Two dictionaries in the place of one."""


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    code: int
    """exit status; minus the signal's number where one ended it"""
    out: str
    """stdout and stderr"""


Launch = Callable[[list[str], Mapping[str, str]], Ended]
"""(arguments after `python`, environment to add) -> how it ended"""


def environment_of(added: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process under test."""
    path = os.pathsep.join(str(REPOSITORY / name) for name in ("benchmarks", "src"))
    # two threads that spin at a barrier while others want the cores made a cell take 360 s instead of 30
    quiet = {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", "COLUMNS": "500"}
    return {**os.environ, **quiet, "PYTHONPATH": path, **added}


def launch(arguments: list[str], environment: Mapping[str, str]) -> Ended:
    """A process of its own, in the repository's root."""
    command, pipe, env = [sys.executable, *arguments], subprocess.PIPE, environment_of(environment)
    done = subprocess.run(command, cwd=REPOSITORY, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    return Ended(done.returncode, done.stdout)


@dataclass(frozen=True)
class Kill:
    """One planned kill."""

    family: str
    point: str
    step: int
    """the optimizer step that it is aimed at; 0 where the point decides (during a resume, at the end)"""
    draw: float
    """in [0, 1): which of several writes"""
    rank: int | None = None
    """of several, the one that dies; None: all of them"""


class RunUnderTest:
    """A run folder that collects kills.

    Args:
        folder: of the run.
        cache: of the activation cache, made beforehand.
        accumulate: micro-batches per step.
        reference: the unbroken run of the same variant; None for that run itself.
        launcher: how a process is started.
        bug: a name in planted_bug.BUGS, or none.
        threads: of torch.
        options: after those of the small run.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path,
        accumulate: int = 1,
        reference: Path | None = None,
        launcher: Launch = launch,
        bug: str | None = None,
        threads: int = 1,
        options: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.accumulate, self.reference, self.bug = folder, accumulate, reference, bug
        self._launch = launcher
        own = (f"data.path={cache}", f"run_dir={folder}", f"accumulate={accumulate}", f"threads={threads}")
        self._options = (*BASE, *own, *options)

    def start(self, environment: Mapping[str, str] | None = None, more: tuple[str, ...] = ()) -> Ended:
        """Starts train.py, or goes on with it, until it ends one way or another."""
        script, env = "train.py", dict(environment or {})
        if self.bug:
            script, env["PLANTED_BUG"] = "benchmarks/killing/planted_bug.py", self.bug
        return self._launch([script, *self._options, *more], env)

    @property
    def resumes_at(self) -> int:
        """Step of the newest whole checkpoint; 0 where there is none."""
        whole = (samples for samples, path in list_checkpoints(self.folder / "checkpoints") if is_whole(path))
        return next(whole, 0) // BATCH

    def kill(self, kill: Kill, log: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Starts the run with `kill` armed and says what happened; `problems` is empty where all was as planned."""
        begin = self.resumes_at
        occurrence = self._occurrence(kill, begin)
        log.unlink(missing_ok=True)
        fault = f"{kill.point}:{occurrence}" + ("" if kill.rank is None else f"@{kill.rank}")
        armed = {"SPARSEPILOT_FAULT": fault, "SPARSEPILOT_FAULT_LOG": str(log)}
        # an unchanged config.yaml is not written again
        more = ("data.prefetch_batches=3",) if kill.point == "config-write" else ()
        ended, problems = self._watched_start(begin, {**(environment or {}), **armed}, more)
        fired = log.read_text(encoding="utf-8").split() if log.exists() else []
        if ended.code != -signal.SIGKILL or set(fired) != {kill.point}:
            problems.append(f"{armed['SPARSEPILOT_FAULT']}: exit {ended.code}, fired {fired}: {ended.out[-500:]}")
        scene = self._scene()
        return {
            "family": kill.family,
            "point": kill.point,
            "occurrence": occurrence,
            "rank": kill.rank,
            "died": len(fired),
            "resumed_at_step": begin,
            "had_checkpoint": self.resumes_at > 0,
            **scene,
            "problems": problems + _unlike(kill.point, scene),
        }

    def finish(self, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Goes on to the end, unbroken, and compares with the reference."""
        begin = self.resumes_at
        ended, problems = self._watched_start(begin, dict(environment or {}))
        if ended.code != 0:
            problems.append(f"exit {ended.code}: {ended.out[-500:]}")
        assert self.reference is not None
        return {
            "resumed_at_step": begin,
            "problems": problems,
            "differences": run_differences(self.reference, self.folder),
        }

    def _watched_start(
        self, begin: int, environment: Mapping[str, str], more: tuple[str, ...] = ()
    ) -> tuple[Ended, list[str]]:
        """Starts, and checks that a resumed process took none of the steps before its checkpoint a second time."""
        before = self._timing_rows(begin)
        ended = self.start(environment, more)
        problems = []
        said = re.search(r"resuming .* at ([\d,]+) samples", ended.out)
        if begin and (said is None or int(said[1].replace(",", "")) != begin * BATCH):
            problems.append(f"should resume at step {begin}: {ended.out[-500:]}")
        if self._timing_rows(begin) != before:  # rows with wall-clock times: taken again, they would be others
            problems.append(f"steps before the checkpoint at step {begin} were trained again")
        return ended, problems

    def _timing_rows(self, up_to_step: int) -> list[str]:
        return [json.dumps(row) for row in read_rows(self.folder / "timing.jsonl") if row["step"] <= up_to_step]

    def _occurrence(self, kill: Kill, begin: int) -> int:
        """How many times the process must pass the point to be at the wanted step."""
        step = max(kill.step, begin + 1)
        if kill.family in ("early", "mid-step"):
            return step - begin
        if kill.family == "metrics":
            assert self.reference is not None
            rows = list(read_rows(self.reference / kill.point.replace("-append", ".jsonl")))
            wanted = next(number for number, row in enumerate(rows) if row["step"] >= step)
            return wanted + 1 - sum(row["step"] <= begin for row in rows)
        if kill.family == "checkpoint":
            saves = math.ceil((step - begin) / SAVE_STEPS)
            if kill.point != "checkpoint-write":
                return saves
            writes = self._writes_per_checkpoint(kill.rank or 0)
            return (saves - 1) * writes + 1 + int(kill.draw * writes)
        return 1 + int(kill.draw * 2) if kill.point == "resume-cut" else 1  # metrics.jsonl or timing.jsonl

    def _writes_per_checkpoint(self, rank: int) -> int:
        assert self.reference is not None
        newest = list_checkpoints(self.reference / "checkpoints")[0][1]
        files = [newest]
        if newest.is_dir():
            files = [newest / f"rank-{rank:05d}.ckpt", *([newest / "index.ckpt"] if rank == 0 else [])]
        counter = _Counter()
        for file in files:
            torch.save(torch.load(file, weights_only=True), counter)  # type: ignore[arg-type]
        return counter.writes

    def _scene(self) -> dict[str, Any]:
        """What the dead process left lying about."""
        rows = list(read_rows(self.folder / "metrics.jsonl"))
        return {
            "last_row_step": rows[-1]["step"] if rows else 0,
            "torn": [name for name in ("metrics.jsonl", "timing.jsonl") if _is_torn(self.folder / name)],
            "checkpoint_tmp_bytes": sum(
                file.stat().st_size
                for path in self.folder.glob("checkpoints/samples-*.tmp")
                for file in (path, *path.rglob("*"))
                if file.is_file()
            ),
        }


class _Counter:
    def __init__(self) -> None:
        self.writes = 0

    def write(self, data: bytes) -> int:
        self.writes += 1
        return len(data)

    def flush(self) -> None:
        pass


def _is_torn(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")


def _unlike(point: str, scene: Mapping[str, Any]) -> list[str]:
    """What at the scene does not fit a kill at `point`."""
    if point.endswith("-append") and scene["torn"] != [point.replace("-append", ".jsonl")]:
        return [f"{point}: no torn line in its file, but in {scene['torn']}"]
    if point in ("checkpoint-rename", "checkpoint-shard") and not scene["checkpoint_tmp_bytes"]:
        return [f"{point}: there is no unrenamed checkpoint"]
    return []
