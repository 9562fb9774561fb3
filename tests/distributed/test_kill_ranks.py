"""Ranks, kill -9 of one or of all, signals to one, another number of them: the run goes on as if nothing had been.

The run, the kills and the comparison are those of benchmarks/kill_campaign.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from killing.compare import run_differences
from killing.ranks import Ranks
from killing.runs import BATCH, SEVERAL, Ended, Kill, Launch, RunUnderTest
from warm import Warm

from sparsepilot.callbacks.checkpoint_io import is_whole, list_checkpoints
from sparsepilot.rows import read_rows

pytestmark = [
    pytest.mark.slow,  # dozens of processes
    pytest.mark.timeout(1200),  # twelve of them in a test, one after the other
]


STEPS = 80
"""Enough for eight checkpoints, and for every kill below."""
SHORT = (f"samples={BATCH * 40}",)
"""Enough for one kill at step 27, and for ten steps after the next checkpoint."""


class Lab:
    """The warm server, and one unbroken run for each number of ranks."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        self.unbroken: dict[tuple[int, str], Path] = {}

    def launcher(self, world: int, trainer: str = "ddp_gloo") -> Launch:
        """So many processes, forked from the warm server."""
        return self.warm if world == 1 else Ranks(world, trainer, self.warm.ranks)

    def reference(self, world: int, trainer: str = "ddp_gloo") -> Path:
        """The unbroken run of so many ranks, made when it is first asked for."""
        if (world, trainer) not in self.unbroken:
            path = self.folder / f"unbroken-{trainer}-{world}"
            ended = self.under(path, self.launcher(world, trainer)).start()
            assert ended.code == 0, ended.out
            self.unbroken[world, trainer] = path
        return self.unbroken[world, trainer]

    def run(self, folder: Path, world: int, trainer: str = "ddp_gloo") -> RunUnderTest:
        return self.under(folder, self.launcher(world, trainer), self.reference(world, trainer))

    def under(
        self,
        folder: Path,
        launcher: Launch,
        reference: Path | None = None,
        options: tuple[str, ...] = (f"samples={BATCH * STEPS}",),
    ) -> RunUnderTest:
        return RunUnderTest(folder, self.folder / "cache", 1, reference, launcher, options=options)


@pytest.fixture(scope="module")
def lab(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), warm)


def assert_close(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Rows of metrics: counts equal, measurements within 1e-5."""
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        for key, value in a.items():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert b[key] == close, (key, a["step"])


def assert_ends_equal(report: dict[str, Any]) -> None:
    assert report["problems"] == []
    assert report["differences"] == []


# each is a run folder that collects its kills and is then finished; ten kills over two ranks
CELLS = {
    "steps and saves": (
        Kill("early", "mid-step", 7, 0.0, rank=1),
        Kill("mid-step", "mid-step", 33, 0.0),
        Kill("checkpoint", "checkpoint-write", 45, 0.6, rank=0),
        Kill("resume", "resume-state", 0, 0.0, rank=1),
        Kill("metrics", "metrics-append", 72, 0.0, rank=0),
    ),
    "resumes and ends": (
        Kill("mid-step", "mid-step-controller", 21, 0.0, rank=0),
        Kill("resume", "resume-cut", 0, 0.0, rank=0),
        Kill("mid-step", "step-start", 52, 0.0, rank=1),
        Kill("checkpoint", "checkpoint-rename", 68, 0.0, rank=0),
        Kill("end", "finish-dictionary", 0, 0.0, rank=0),
    ),
}
TRAINERS = ("ddp_gloo", "fsdp_cpu")


def assert_cell_ends_equal(run: RunUnderTest, kills: tuple[Kill, ...], log: Path) -> None:
    for kill in kills:
        began_s = time.monotonic()
        assert run.kill(kill, log)["problems"] == []
        assert time.monotonic() - began_s < 60  # no rank waits for the dead one
    assert_ends_equal(run.finish())


def test_ranks_with_several_trainees_are_killed_and_go_on(lab: Lab, tmp_path: Path) -> None:
    given = {"launcher": lab.launcher(2), "options": (*SEVERAL, *SHORT)}
    ended = lab.under(tmp_path / "unbroken", **given).start()
    assert ended.code == 0, ended.out
    kill = Kill("mid-step", "mid-step", 27, 0.0, rank=1)
    run = lab.under(tmp_path / "run", reference=tmp_path / "unbroken", **given)
    assert_cell_ends_equal(run, (kill,), tmp_path / "fault.log")


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("cell", list(CELLS))
def test_killed_ranks_end_as_unbroken_ones(lab: Lab, tmp_path: Path, cell: str, trainer: str) -> None:
    assert_cell_ends_equal(lab.run(tmp_path / "run", 2, trainer), CELLS[cell], tmp_path / "fault.log")


def test_the_file_of_one_rank_counts_for_all(lab: Lab, tmp_path: Path) -> None:
    """Rank 1 is killed within its file and when it is written; its disk is full (all end, one says so); one bit of its
    file is another (the checkpoint before is taken)."""
    run = lab.run(tmp_path / "run", 2, "fsdp_cpu")
    for kill, resumes_at in (
        (Kill("checkpoint", "checkpoint-write", 35, 0.6, rank=1), 30),
        (Kill("checkpoint", "checkpoint-shard", 43, 0.0, rank=1), 40),
    ):
        assert run.kill(kill, tmp_path / "fault.log")["problems"] == []
        assert run.resumes_at == resumes_at
    before = list_checkpoints(run.folder / "checkpoints")
    for _, path in before:
        assert is_whole(path)
        assert sorted(file.name for file in path.iterdir()) == ["index.ckpt", "rank-00000.ckpt", "rank-00001.ckpt"]

    def on_a_full_disk(arguments: list[str], environment: Mapping[str, str]) -> Ended:
        options = [*arguments, "trainer=fsdp_cpu", "trainer.devices=2"]
        ended = lab.warm.ranks(2, options, environment, file_bytes={1: 20_000})
        assert [e.code for e in ended] == [2, 2]
        return Ended(2, "".join(e.out for e in ended))

    ended = lab.under(run.folder, on_a_full_disk).start()
    errors = [line for line in ended.out.splitlines() if "error" in line]
    assert len(errors) == 1, ended.out
    assert "rank-00001.ckpt: the disk is full; checkpoints written before are whole" in errors[0]
    assert list_checkpoints(run.folder / "checkpoints") == before

    file = before[0][1] / "rank-00001.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run.resumes_at == 30
    assert_ends_equal(run.finish())


def test_any_trainer_goes_on_from_any_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """One process, FSDP2 over four ranks and over two, DDP, one process: as one unbroken run."""
    folder = tmp_path / "run"
    legs = [(1, "cpu", 17), (4, "fsdp_cpu", 37), (2, "fsdp_cpu", 57), (2, "ddp_gloo", 77), (1, "cpu", 0)]
    begins = 0
    for world, trainer, dies_at in legs:
        run = lab.under(folder, lab.launcher(world, trainer))
        assert run.resumes_at == begins
        if dies_at:
            assert run.kill(Kill("mid-step", "mid-step", dies_at, 0.0), tmp_path / "fault.log")["problems"] == []
            begins = dies_at // 10 * 10
        else:
            ended = run.start()
            assert ended.code == 0, ended.out
            assert "same order of data but not the same bits: ranks was 2, is 1" in ended.out
    expected = list(read_rows(lab.reference(2, "fsdp_cpu") / "metrics.jsonl"))
    assert_close(expected, list(read_rows(folder / "metrics.jsonl")))


def test_four_ranks_add_up_in_one_order(lab: Lab, tmp_path: Path) -> None:
    """In a ring, other messages in the first step of a process would make other bits of them."""
    given = {"launcher": lab.launcher(4), "options": SHORT}
    ended = lab.under(tmp_path / "unbroken", **given).start()
    assert ended.code == 0, ended.out
    kill = Kill("mid-step", "mid-step", 27, 0.0, rank=3)
    run = lab.under(tmp_path / "run", reference=tmp_path / "unbroken", **given)
    assert_cell_ends_equal(run, (kill,), tmp_path / "fault.log")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_stops_all_of_them_at_one_step(lab: Lab, tmp_path: Path, victim: int) -> None:
    run = lab.run(tmp_path / "run", 2)
    for name, step in (("SIGTERM", 23), ("SIGUSR1", 57)):
        ended = run.start({"KILLING_SIGNAL": f"{name}:{(step - 1) * BATCH}@{victim}"})
        assert ended.code == 0, ended.out
        assert ended.out.count("stopped and saved at") == 1
        assert run.resumes_at == step
    assert_ends_equal(run.finish())


@pytest.mark.parametrize("more_ranks", [1, 4])
def test_another_number_of_ranks_goes_on_with_the_same_samples(lab: Lab, tmp_path: Path, more_ranks: int) -> None:
    run = lab.run(tmp_path / "run", 2)
    assert run.kill(Kill("mid-step", "mid-step", 47, 0.0), tmp_path / "fault.log")["problems"] == []
    before = (run.folder / "metrics.jsonl").read_bytes()
    ended = lab.under(run.folder, lab.launcher(more_ranks)).start()
    assert ended.code == 0, ended.out
    assert f"at {40 * BATCH:,} samples" in ended.out
    assert ended.out.count("same order of data but not the same bits: ranks was 2") == 1
    assert (run.folder / "metrics.jsonl").read_bytes().startswith(before[: before.index(b'{"step": 41')])
    expected = list(read_rows(lab.reference(2) / "metrics.jsonl"))
    assert_close(expected, list(read_rows(run.folder / "metrics.jsonl")))


def test_ranks_that_do_not_share_the_streams_are_refused(lab: Lab, tmp_path: Path) -> None:
    run = lab.run(tmp_path / "run", 2)
    shutil.copytree(lab.reference(2), run.folder, symlinks=True)
    ended = lab.under(run.folder, lab.launcher(3)).start()
    assert ended.code == 2
    # once by each: nobody ends the others here, as srun, torchrun and launch.py do when the first has spoken
    assert ended.out.splitlines() == 3 * [
        "error: trainer.devices = 3: 3 ranks cannot share data.num_streams = 16 equally; so many can: 1, 2, 4, 8, 16"
    ]
    assert run_differences(lab.reference(2), run.folder) == []
