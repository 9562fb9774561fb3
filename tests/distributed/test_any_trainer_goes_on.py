"""A run goes on from its checkpoint with another trainer, another grid of ranks, or the same after a kill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killing.ranks import Ranks
from killing.runs import BATCH, Ended, Kill, Launch, RunUnderTest
from warm import Warm

from sparsepilot.rows import read_rows

pytestmark = pytest.mark.slow  # dozens of processes

SHARED = "feature_parallel_cpu"
GRID = (4, SHARED, "trainer.strategy.features=2")
LEGS = ((2, SHARED), GRID, (1, "cpu"), (4, SHARED), (2, "fsdp_cpu"), (2, SHARED), (2, "ddp_gloo"))
"""ranks and their trainer; each takes eight steps"""
STEPS = 8


def ranks(warm: Warm, world: int, trainer: str, *more: str) -> Launch:
    """A launcher for `RunUnderTest`, of processes forked from the warm server."""
    return warm if world == 1 else Ranks(world, trainer, warm.ranks, more)


def stop_at(run: RunUnderTest, step: int) -> Ended:
    """Trains up to the end of a step, where a signal stops it."""
    ended = run.start({"KILLING_SIGNAL": f"SIGTERM:{(step - 1) * BATCH}"})
    assert ended.code == 0, ended.out
    assert run.resumes_at == step
    return ended


def test_from_any_trainer_to_any_other(warm: Warm, tmp_path: Path) -> None:
    alone = RunUnderTest(tmp_path / "alone", tmp_path / "cache", launcher=warm)
    stop_at(alone, STEPS * len(LEGS))
    for number, (world, trainer, *more) in enumerate(LEGS):
        run = RunUnderTest(tmp_path / "chain", tmp_path / "cache", launcher=ranks(warm, world, trainer, *more))
        ended = stop_at(run, STEPS * (number + 1))
        newest = sorted((tmp_path / "chain" / "checkpoints").glob("samples-*.ckpt"))[-1]
        assert newest.is_dir() == (trainer in (SHARED, "fsdp_cpu"))
        assert ("same order of data but not the same bits" in ended.out) == (number > 0)
    expected, found = (list(read_rows(tmp_path / name / "metrics.jsonl")) for name in ("alone", "chain"))
    assert len(found) == len(expected) > STEPS * len(LEGS)
    for a, b in zip(expected, found, strict=True):
        for key, value in a.items():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert b[key] == close, (key, a["step"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills as POSIX has them")
def test_a_killed_grid_ends_as_an_unbroken_one(warm: Warm, tmp_path: Path) -> None:
    given = {"launcher": ranks(warm, *GRID), "options": (f"samples={BATCH * 40}",)}
    unbroken = RunUnderTest(tmp_path / "unbroken", tmp_path / "cache", **given)
    assert unbroken.start().code == 0
    run = RunUnderTest(tmp_path / "run", tmp_path / "cache", 1, unbroken.folder, **given)
    assert run.kill(Kill("mid-step", "mid-step", 27, 0.0, rank=3), tmp_path / "fault.log")["problems"] == []
    report = run.finish()
    assert report["problems"] == []
    assert report["differences"] == []
