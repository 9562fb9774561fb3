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
from killing.runs import BATCH, Ended, Kill, RunUnderTest
from warm import Warm

from sparsepilot.callbacks.checkpoint_io import is_whole, list_checkpoints
from sparsepilot.rows import read_rows

pytestmark = pytest.mark.slow  # dozens of processes


class Ranks:
    """A launcher for `RunUnderTest`: so many processes in the place of one."""

    def __init__(self, warm: Warm, world: int, victim: int | None = None, trainer: str = "ddp_gloo") -> None:
        """victim: the rank that what is armed is armed for; None: all."""
        self.warm, self.world, self.victim, self.trainer = warm, world, victim, trainer

    def __call__(self, arguments: list[str], environment: Mapping[str, str]) -> Ended:
        armed = {key: value for key, value in environment.items() if key.startswith(("SPARSEPILOT_FAULT", "KILLING"))}
        rest = {key: value for key, value in environment.items() if key not in armed}
        if self.world == 1:
            return self.warm(arguments, environment)
        of_rank = {rank: dict(armed) for rank in range(self.world) if self.victim in (None, rank)}
        for rank, own in of_rank.items():
            if self.victim is None and rank > 0:
                own.pop("SPARSEPILOT_FAULT_LOG", None)  # one line in the log, however many die
        ranks = [f"trainer={self.trainer}", f"trainer.devices={self.world}"]
        ended = self.warm.ranks(self.world, arguments + ranks, rest, of_rank)
        codes = [e.code for e in ended]
        return Ended(min(codes) if min(codes) < 0 else max(codes), "".join(e.out for e in ended))


class Lab:
    """The warm server, and one unbroken run for each trainer and number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warm = Warm(folder)
        self.unbroken: dict[tuple[str, int], Path] = {}

    def reference(self, world: int, trainer: str = "ddp_gloo") -> Path:
        """The unbroken run of so many ranks, made when it is first asked for."""
        if (trainer, world) not in self.unbroken:
            path = self.folder / f"unbroken-{trainer}-{world}"
            launcher = Ranks(self.warm, world, trainer=trainer)
            ended = RunUnderTest(path, self.folder / "cache", launcher=launcher).start()
            assert ended.code == 0, ended.out
            self.unbroken[trainer, world] = path
        return self.unbroken[trainer, world]

    def run(self, folder: Path, world: int, victim: int | None = None, trainer: str = "ddp_gloo") -> RunUnderTest:
        launcher, reference = Ranks(self.warm, world, victim, trainer), self.reference(world, trainer)
        return RunUnderTest(folder, self.folder / "cache", 1, reference, launcher=launcher, rank=victim or 0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.warm.close()


def assert_close(expected: list[dict[str, Any]], found: list[dict[str, Any]], steps: int) -> None:
    """Rows of metrics up to so many steps: counts equal, measurements within 1e-5."""
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        for key, value in a.items() if a["step"] <= steps else ():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert b[key] == close, (key, a["step"])


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


def test_divided_parameters_end_as_unbroken_ones_whatever_happened(lab: Lab, tmp_path: Path) -> None:
    """All ranks killed, one within its file, one when its file is written, rank 0 before it gives the folder its name;
    one rank's disk is full (all end, one says so); one bit of one rank's file is another (the one before is taken)."""
    for victim, kill, resumes_at in (
        (None, Kill("mid-step", "mid-step", 33, 0.0), 30),
        (1, Kill("checkpoint", "checkpoint-write", 35, 0.6), 30),
        (1, Kill("checkpoint", "checkpoint-shard", 43, 0.0), 40),
        (0, Kill("checkpoint", "checkpoint-rename", 57, 0.0), 50),
    ):
        run = lab.run(tmp_path / "run", 2, victim, "fsdp_cpu")
        assert run.kill(kill, tmp_path / "fault.log")["problems"] == []
        assert run.resumes_at == resumes_at
    before = list_checkpoints(run.folder / "checkpoints")
    assert len(before) >= 2  # and the best one, where it is older
    for _, path in before:
        assert is_whole(path)
        assert sorted(file.name for file in path.iterdir()) == ["index.ckpt", "rank-00000.ckpt", "rank-00001.ckpt"]

    def on_a_full_disk(arguments: list[str], environment: Mapping[str, str]) -> Ended:
        options = [*arguments, "trainer=fsdp_cpu", "trainer.devices=2"]
        ended = lab.warm.ranks(2, options, environment, file_bytes={1: 20_000})
        assert [e.code for e in ended] == [2, 2]
        return Ended(2, "".join(e.out for e in ended))

    ended = RunUnderTest(run.folder, lab.folder / "cache", 1, launcher=on_a_full_disk).start()
    errors = [line for line in ended.out.splitlines() if "error" in line]
    assert len(errors) == 1, ended.out
    assert "rank-00001.ckpt: the disk is full; checkpoints written before are whole" in errors[0]
    assert list_checkpoints(run.folder / "checkpoints") == before

    file = before[0][1] / "rank-00001.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run.resumes_at == 40
    assert_ends_equal(run.finish())


def test_any_trainer_goes_on_from_any_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """One process, FSDP2 over four ranks and over two, DDP, one process: as one unbroken run."""
    folder = tmp_path / "run"
    legs = [(1, "cpu", 17), (4, "fsdp_cpu", 37), (2, "fsdp_cpu", 57), (2, "ddp_gloo", 77), (1, "cpu", 0)]
    begins = 0
    for world, trainer, dies_at in legs:
        launcher = Ranks(lab.warm, world, trainer=trainer)
        run = RunUnderTest(folder, lab.folder / "cache", 1, launcher=launcher)
        assert run.resumes_at == begins
        if dies_at:
            assert run.kill(Kill("mid-step", "mid-step", dies_at, 0.0), tmp_path / "fault.log")["problems"] == []
            begins = dies_at // 10 * 10
        else:
            ended = run.start()
            assert ended.code == 0, ended.out
            changed = "ranks was 2, is 1"  # a file says nothing of how the parameters lay
            assert f"same order of data but not the same bits: {changed}" in ended.out
    expected = list(read_rows(lab.reference(2, "fsdp_cpu") / "metrics.jsonl"))
    assert_close(expected, list(read_rows(folder / "metrics.jsonl")), steps=90)


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
    expected = list(read_rows(lab.reference(2) / "metrics.jsonl"))
    assert_close(expected, list(read_rows(run.folder / "metrics.jsonl")), steps=90)


def test_ranks_that_do_not_share_the_streams_are_refused_once(lab: Lab, tmp_path: Path) -> None:
    run = lab.run(tmp_path / "run", 2)
    shutil.copytree(lab.reference(2), run.folder, symlinks=True)
    ended = RunUnderTest(run.folder, lab.folder / "cache", 1, launcher=Ranks(lab.warm, 3)).start()
    assert ended.code == 2
    assert ended.out.strip() == (
        "error: trainer.devices = 3: 3 ranks cannot share data.num_streams = 16 equally; so many can: 1, 2, 4, 8, 16"
    )
    assert run_differences(lab.reference(2), run.folder) == []
