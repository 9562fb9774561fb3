"""Ranks, kill -9 of one or of all, signals to one, another number of them: the run goes on as if nothing had been.

The run, the kills and the comparison are those of benchmarks/kill_campaign.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from killing.compare import run_differences
from killing.runs import BATCH, SEVERAL, Ended, Kill, RunUnderTest
from warm import Warm

from sparsepilot.rows import read_rows

pytestmark = pytest.mark.slow  # dozens of processes


class Ranks:
    """A launcher for `RunUnderTest`: so many processes in the place of one."""

    def __init__(self, warm: Warm, world: int, victim: int | None = None) -> None:
        """victim: the rank that what is armed is armed for; None: all."""
        self.warm, self.world, self.victim = warm, world, victim

    def __call__(self, arguments: list[str], environment: Mapping[str, str]) -> Ended:
        armed = {key: value for key, value in environment.items() if key.startswith(("SPARSEPILOT_FAULT", "KILLING"))}
        rest = {key: value for key, value in environment.items() if key not in armed}
        if self.world == 1:
            return self.warm(arguments, environment)
        of_rank = {rank: dict(armed) for rank in range(self.world) if self.victim in (None, rank)}
        for rank, own in of_rank.items():
            if self.victim is None and rank > 0:
                own.pop("SPARSEPILOT_FAULT_LOG", None)  # one line in the log, however many die
        ranks = ["trainer=ddp_gloo", f"trainer.devices={self.world}"]
        ended = self.warm.ranks(self.world, arguments + ranks, rest, of_rank)
        codes = [e.code for e in ended]
        return Ended(min(codes) if min(codes) < 0 else max(codes), "".join(e.out for e in ended))


class Lab:
    """The warm server, and one unbroken run for each number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warm = Warm(folder)
        self.unbroken: dict[int, Path] = {}

    def reference(self, world: int) -> Path:
        """The unbroken run of so many ranks, made when it is first asked for."""
        if world not in self.unbroken:
            path = self.folder / f"unbroken-{world}"
            ended = RunUnderTest(path, self.folder / "cache", launcher=Ranks(self.warm, world)).start()
            assert ended.code == 0, ended.out
            self.unbroken[world] = path
        return self.unbroken[world]

    def run(self, folder: Path, world: int, victim: int | None = None) -> RunUnderTest:
        launcher = Ranks(self.warm, world, victim)
        return RunUnderTest(folder, self.folder / "cache", 1, self.reference(world), launcher=launcher)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.warm.close()


def assert_ends_equal(report: dict[str, Any]) -> None:
    assert report["problems"] == []
    assert report["differences"] == []


@pytest.mark.parametrize(
    ("world", "victim", "kill"),
    [
        (2, None, Kill("mid-step", "mid-step", 33, 0.0)),
        (2, 0, Kill("mid-step", "mid-step-controller", 61, 0.0)),
        (2, 1, Kill("mid-step", "step-start", 52, 0.0)),
        (2, 1, Kill("early", "mid-step", 7, 0.0)),
        (2, 0, Kill("checkpoint", "checkpoint-write", 35, 0.6)),
        (2, 0, Kill("checkpoint", "checkpoint-rename", 48, 0.0)),
        (2, 0, Kill("metrics", "metrics-append", 57, 0.0)),
        # four ranks add up in a ring: with other messages in the first step of a process their bits would differ
        (4, 3, Kill("mid-step", "mid-step", 47, 0.0)),
    ],
)
def test_killed_ranks_end_as_unbroken_ones(
    lab: Lab, tmp_path: Path, world: int, victim: int | None, kill: Kill
) -> None:
    run = lab.run(tmp_path / "run", world, victim)
    began_s = time.monotonic()
    assert run.kill(kill, tmp_path / "fault.log")["problems"] == []
    assert time.monotonic() - began_s < 60  # no rank waits for the dead one
    assert_ends_equal(run.finish())


def test_ranks_with_several_trainees_are_killed_and_go_on(lab: Lab, tmp_path: Path) -> None:
    def run(folder: Path, reference: Path | None, victim: int | None) -> RunUnderTest:
        launcher = Ranks(lab.warm, 2, victim)
        return RunUnderTest(folder, lab.folder / "cache", 1, reference, launcher=launcher, options=SEVERAL)

    ended = run(tmp_path / "unbroken", None, None).start()
    assert ended.code == 0, ended.out
    broken = run(tmp_path / "run", tmp_path / "unbroken", 1)
    assert broken.kill(Kill("mid-step", "mid-step", 47, 0.0), tmp_path / "fault.log")["problems"] == []
    assert_ends_equal(broken.finish())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_stops_all_of_them_at_one_step(lab: Lab, tmp_path: Path, victim: int) -> None:
    run = lab.run(tmp_path / "run", 2, victim)
    for name, step in (("SIGTERM", 23), ("SIGUSR1", 57)):
        ended = run.start({"KILLING_SIGNAL": f"{name}:{(step - 1) * BATCH}"})
        assert ended.code == 0, ended.out
        assert ended.out.count("stopped and saved at") == 1
        assert run.resumes_at == step
    assert_ends_equal(run.finish())


@pytest.mark.parametrize("more_ranks", [1, 4])
def test_another_number_of_ranks_goes_on_with_the_same_samples(lab: Lab, tmp_path: Path, more_ranks: int) -> None:
    run = lab.run(tmp_path / "run", 2)
    assert run.kill(Kill("mid-step", "mid-step", 47, 0.0), tmp_path / "fault.log")["problems"] == []
    before = (run.folder / "metrics.jsonl").read_bytes()
    other = RunUnderTest(run.folder, lab.folder / "cache", 1, launcher=Ranks(lab.warm, more_ranks))
    ended = other.start()
    assert ended.code == 0, ended.out
    assert f"at {40 * BATCH:,} samples" in ended.out
    assert ended.out.count("same order of data but not the same bits: ranks was 2") == 1
    assert (run.folder / "metrics.jsonl").read_bytes().startswith(before[: before.index(b'{"step": 41')])
    expected = [row for row in read_rows(lab.reference(2) / "metrics.jsonl") if row["step"] <= 90]
    found = [row for row in read_rows(run.folder / "metrics.jsonl") if row["step"] <= 90]
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        for key, value in a.items():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert b[key] == close, (key, a["step"])


def test_ranks_that_do_not_share_the_streams_are_refused_once(lab: Lab, tmp_path: Path) -> None:
    run = lab.run(tmp_path / "run", 2)
    shutil.copytree(lab.reference(2), run.folder, symlinks=True)
    ended = RunUnderTest(run.folder, lab.folder / "cache", 1, launcher=Ranks(lab.warm, 3)).start()
    assert ended.code == 2
    assert ended.out.strip() == (
        "error: trainer.devices = 3: 3 ranks cannot share data.num_streams = 16 equally; so many can: 1, 2, 4, 8, 16"
    )
    assert run_differences(lab.reference(2), run.folder) == []
