"""A run goes on from its checkpoint with another trainer, another grid of ranks, or the same after a kill."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from killing.runs import BATCH, Ended, Kill, RunUnderTest
from warm import Warm

from sparsepilot.rows import read_rows

pytestmark = pytest.mark.slow  # dozens of processes

SHARED = "trainer=feature_parallel_cpu"
LEGS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, (SHARED,)),
    (4, (SHARED, "trainer.strategy.features=2")),
    (1, ()),
    (4, (SHARED,)),
    (2, ("trainer=fsdp_cpu",)),
    (2, (SHARED,)),
    (2, ("trainer=ddp_gloo",)),
)
"""ranks and their trainer; each takes eight steps"""
STEPS = 8


class Ranks:
    """A launcher for `RunUnderTest`: so many ranks of a trainer in the place of one."""

    def __init__(self, warm: Warm, world: int, options: tuple[str, ...]) -> None:
        self.warm, self.world, self.options = warm, world, options

    def __call__(self, arguments: list[str], environment: Mapping[str, str]) -> Ended:
        if self.world == 1:
            return self.warm(arguments, environment)
        options = [*self.options, f"trainer.devices={self.world}"]
        ended = self.warm.ranks(self.world, arguments + options, environment)
        codes = [e.code for e in ended]
        return Ended(min(codes) if min(codes) < 0 else max(codes), "".join(e.out for e in ended))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    made = Warm(tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


def stop_at(run: RunUnderTest, step: int) -> Ended:
    """Trains up to the end of a step, where a signal stops it."""
    ended = run.start({"KILLING_SIGNAL": f"SIGTERM:{(step - 1) * BATCH}"})
    assert ended.code == 0, ended.out
    assert run.resumes_at == step
    return ended


def test_from_any_trainer_to_any_other(warm: Warm, tmp_path: Path) -> None:
    alone = RunUnderTest(tmp_path / "alone", tmp_path / "cache", launcher=Ranks(warm, 1, ()))
    stop_at(alone, STEPS * len(LEGS))
    for number, (world, options) in enumerate(LEGS):
        run = RunUnderTest(tmp_path / "chain", tmp_path / "cache", launcher=Ranks(warm, world, options))
        ended = stop_at(run, STEPS * (number + 1))
        newest = sorted((tmp_path / "chain" / "checkpoints").glob("samples-*.ckpt"))[-1]
        assert newest.is_dir() == ("ddp_gloo" not in str(options) and world > 1)
        assert ("same order of data but not the same bits" in ended.out) == (number > 0)
    expected, found = (list(read_rows(tmp_path / name / "metrics.jsonl")) for name in ("alone", "chain"))
    assert len(found) == len(expected) > STEPS * len(LEGS)
    for a, b in zip(expected, found, strict=True):
        for key, value in a.items():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert b[key] == close, (key, a["step"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills as POSIX has them")
def test_a_killed_grid_ends_as_an_unbroken_one(warm: Warm, tmp_path: Path) -> None:
    grid = (SHARED, "trainer.strategy.features=2")
    unbroken = RunUnderTest(tmp_path / "unbroken", tmp_path / "cache", launcher=Ranks(warm, 4, grid))
    assert unbroken.start().code == 0
    run = RunUnderTest(tmp_path / "run", tmp_path / "cache", 1, unbroken.folder, launcher=Ranks(warm, 4, grid))
    assert run.kill(Kill("mid-step", "mid-step", 47, 0.0, rank=3), tmp_path / "fault.log")["problems"] == []
    report = run.finish()
    assert report["problems"] == []
    assert report["differences"] == []
