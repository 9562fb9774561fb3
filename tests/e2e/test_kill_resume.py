"""Kill, stop, damage, refuse: a run goes on bit for bit as if it had never been broken, or says in one line why not.

Each process is real and dies by a real SIGKILL; the run and the comparison are those of benchmarks/kill_campaign.py.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from killing.compare import run_differences
from killing.planted_bug import BUGS
from killing.runs import BATCH, SEVERAL, Ended, Kill, RunUnderTest
from warm import Warm

from sparsepilot.callbacks.checkpoint_io import CrashSafeIO, is_whole, list_checkpoints
from sparsepilot.rows import read_rows

pytestmark = [
    pytest.mark.slow,  # a hundred starts of train.py
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and signals as POSIX has them"),
]


STEPS = 80
SHORT = (f"samples={BATCH * STEPS}",)
"""Enough for eight checkpoints, and for every kill below."""


class Lab:
    """The warm server, one cache, one unbroken run of each kind and one run that was killed at step 47."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        self.unbroken = {accumulate: folder / f"unbroken-{accumulate}" for accumulate in (1, 2)}
        for accumulate, reference in self.unbroken.items():
            ended = RunUnderTest(reference, folder / "cache", accumulate, launcher=self.warm, options=SHORT).start()
            assert ended.code == 0, ended.out
        broken = self.run(folder / "broken")
        report = broken.kill(Kill("mid-step", "mid-step", 47, 0.0), folder / "fault.log")
        assert report["problems"] == []
        assert broken.resumes_at == 40

    def run(self, folder: Path, accumulate: int = 1, **options: Any) -> RunUnderTest:
        given = {"launcher": self.warm, "options": SHORT, **options}
        return RunUnderTest(folder, self.folder / "cache", accumulate, self.unbroken[accumulate], **given)

    def broken(self, folder: Path) -> RunUnderTest:
        """A copy of the run that was killed at step 47, with checkpoints at 30 and 40."""
        shutil.copytree(self.folder / "broken", folder, symlinks=True)
        return self.run(folder)


@pytest.fixture(scope="module")
def lab(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), warm)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_one_clear_line(ended: Ended, *parts: str) -> None:
    """Exit status 2, one line of error with `parts` in it, no traceback."""
    assert ended.code == 2, ended.out
    assert "Traceback" not in ended.out
    errors = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.out
    assert ended.out.splitlines()[-1] == errors[0]  # and it is the end of it
    for part in parts:
        assert part in errors[0]


def assert_ends_equal(run: RunUnderTest) -> dict[str, Any]:
    """Finishes the run, which must resume where it should and end as the unbroken one."""
    report = run.finish()
    assert report["problems"] == []
    assert report["differences"] == []
    return report


# ------------------------------------------------------------ kill -9


@pytest.mark.parametrize(
    ("accumulate", "kill"),
    [
        (1, Kill("mid-step", "mid-step", 33, 0.0)),
        (1, Kill("mid-step", "mid-step-controller", 61, 0.0)),
        (2, Kill("mid-step", "step-start", 52, 0.0)),  # between the two backward passes
        (1, Kill("early", "mid-step", 7, 0.0)),  # before the first checkpoint
        (1, Kill("checkpoint", "checkpoint-write", 35, 0.6)),
        (2, Kill("checkpoint", "checkpoint-rename", 48, 0.0)),
        (1, Kill("checkpoint", "checkpoint-link", 22, 0.0)),
        (1, Kill("metrics", "metrics-append", 44, 0.0)),
    ],
    ids=lambda value: value.point if isinstance(value, Kill) else f"accumulate-{value}",
)
def test_a_killed_run_ends_as_an_unbroken_one(lab: Lab, tmp_path: Path, accumulate: int, kill: Kill) -> None:
    run = lab.run(tmp_path / "run", accumulate)
    assert run.kill(kill, tmp_path / "fault.log")["problems"] == []
    assert_ends_equal(run)


def test_several_trainees_are_killed_and_go_on(lab: Lab, tmp_path: Path) -> None:
    unbroken, given = tmp_path / "unbroken", {"launcher": lab.warm, "options": (*SEVERAL, *SHORT)}
    ended = RunUnderTest(unbroken, lab.folder / "cache", **given).start()
    assert ended.code == 0, ended.out
    run = RunUnderTest(tmp_path / "run", lab.folder / "cache", 1, unbroken, **given)
    for kill in (Kill("mid-step", "mid-step", 33, 0.0), Kill("checkpoint", "checkpoint-write", 64, 0.6)):
        assert run.kill(kill, tmp_path / "fault.log")["problems"] == []
    assert_ends_equal(run)
    assert {path.parent.name for path in run.folder.glob("*/sae.json")} == {"wide", "jump"}


@pytest.mark.parametrize("point", ["resume-cut", "resume-state", "config-write"])
def test_a_run_killed_while_it_resumes(lab: Lab, tmp_path: Path, point: str) -> None:
    run = lab.broken(tmp_path / "run")
    assert run.kill(Kill("resume", point, 0, 0.0), tmp_path / "fault.log")["problems"] == []
    assert run.resumes_at == 40
    assert_ends_equal(run)


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_number_left_out_of_the_state_is_found(lab: Lab, tmp_path: Path, bug: str) -> None:
    run = lab.run(tmp_path / "run", bug=bug)
    assert run.kill(Kill("mid-step", "mid-step", 47, 0.0), tmp_path / "fault.log")["problems"] == []
    report = run.finish()
    assert report["problems"] == []  # it ran; nothing but the comparison tells
    assert any(line.startswith("metrics.jsonl") for line in report["differences"])
    assert any("autoencoder.W_enc" in line for line in report["differences"])


# ------------------------------------------------------------ signals


def test_signals_save_and_leave(lab: Lab, tmp_path: Path) -> None:
    run = lab.run(tmp_path / "run", accumulate=2)
    for name, step in (("SIGTERM", 23), ("SIGUSR1", 57), ("SIGINT", 71)):
        ended = run.start({"KILLING_SIGNAL": f"{name}:{(step - 1) * BATCH}"})
        assert ended.code == 0, ended.out
        assert run.resumes_at == step  # the step that the signal fell into was finished and saved
        assert not (run.folder / "summary.json").exists()
    assert_ends_equal(run)


def test_a_job_that_slurm_does_not_take_back_has_failed_with_everything_saved(lab: Lab, tmp_path: Path) -> None:
    """Or what waits for its end would start, and nobody would start it again."""
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho no >&2; exit 1\n")
    program.chmod(0o755)
    run = lab.run(tmp_path / "run")
    refusing = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = run.start({"KILLING_SIGNAL": f"SIGUSR1:{56 * BATCH}", **refusing})
    assert ended.code == 128 + signal.SIGUSR1, ended.out
    assert "job 7 could not be put back into the queue: no" in ended.out
    assert run.resumes_at == 57
    assert_ends_equal(run)


# ------------------------------------------------------------ damage


def flip_in_the_middle(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def flip_in_the_directory(data: bytearray) -> None:
    """Says in torch's zip directory that a tensor is a folder: torch would load zeros, without a word."""
    entry = data.rfind(b"PK\x01\x02", 0, data.rfind(b"/data/3"))
    data[entry + 38] ^= 0x10


def truncate(data: bytearray) -> None:
    del data[len(data) * 2 // 3 :]


@pytest.mark.parametrize("damage", [flip_in_the_middle, flip_in_the_directory, truncate])
def test_a_damaged_last_checkpoint_falls_back(lab: Lab, tmp_path: Path, damage: Callable[[bytearray], None]) -> None:
    run = lab.broken(tmp_path / "run")
    [(_, newest), (before, _), *_] = list_checkpoints(run.folder / "checkpoints")
    data = bytearray(newest.read_bytes())
    damage(data)
    newest.write_bytes(data)
    assert run.resumes_at == before // BATCH == 30
    ended = run.start()
    assert ended.code == 0, ended.out
    assert f"{newest} is damaged; falling back" in ended.out
    assert f"at {before:,} samples" in ended.out
    assert run_differences(lab.unbroken[1], run.folder) == []


def test_every_checkpoint_damaged_is_an_error(lab: Lab, tmp_path: Path) -> None:
    run = lab.broken(tmp_path / "run")
    for _, path in list_checkpoints(run.folder / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(run.folder)
    assert_one_clear_line(run.start(), "every checkpoint is damaged", "resume=never")
    assert contents(run.folder) == before


# ------------------------------------------------------------ another configuration


@pytest.mark.parametrize(
    ("change", "shown"),
    [("model.k=5", "model.k: 4 -> 5"), ("data.num_streams=32", "data.num_streams: 16 -> 32"),
     (f"samples={BATCH * 60}", f"samples: {BATCH * STEPS} -> {BATCH * 60}")],
)  # fmt: skip
def test_another_model_or_order_of_rows_or_a_shorter_budget_is_refused(
    lab: Lab, tmp_path: Path, change: str, shown: str
) -> None:
    run = lab.broken(tmp_path / "run")
    before = contents(run.folder)
    assert_one_clear_line(run.start(more=(change,)), shown, "resume=never")
    assert contents(run.folder) == before


def test_trainer_and_logger_may_change(lab: Lab, tmp_path: Path) -> None:
    run = lab.broken(tmp_path / "run")
    ended = run.start(more=("logger=csv", "+trainer.benchmark=false"))
    assert ended.code == 0, ended.out
    assert "changed: trainer.benchmark: None -> False" in ended.out
    assert "changed: logger.csv" in ended.out
    assert (run.folder / "config-1.yaml").exists()
    assert run_differences(lab.unbroken[1], run.folder) == []


def test_a_longer_budget_trains_on(lab: Lab, tmp_path: Path) -> None:
    shutil.copytree(lab.unbroken[1], tmp_path / "run", symlinks=True)
    run = lab.run(tmp_path / "run")
    more = 30
    ended = run.start(more=(f"samples={BATCH * (STEPS + more)}",))
    assert ended.code == 0, ended.out
    assert run.resumes_at == STEPS + more
    before, after = ((folder / "metrics.jsonl").read_bytes() for folder in (lab.unbroken[1], run.folder))
    assert after.startswith(before)
    steps = [row["step"] for row in read_rows(run.folder / "metrics.jsonl") if "train/loss" in row]
    assert steps[-4:] == [99, 100, 105, 110]
    assert any(line.startswith("sae.safetensors") for line in run_differences(lab.unbroken[1], run.folder))


def test_resume_never_leaves_the_old_run_alone(lab: Lab, tmp_path: Path) -> None:
    run = lab.broken(tmp_path / "run")
    before = contents(run.folder)
    ended = run.start(more=("resume=never",))
    assert ended.code == 0, ended.out
    assert contents(run.folder) == before
    assert run_differences(lab.unbroken[1], tmp_path / "run-2") == []


# ------------------------------------------------------------ another checkpoint


def another_architecture(checkpoint: dict[str, Any]) -> str:
    checkpoint["sparsepilot"]["architectures"]["sae"] = "jumprelu"
    return "jumprelu"


def another_shape(checkpoint: dict[str, Any]) -> str:
    name = "trainees.sae.autoencoder.W_enc"
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name][:256].clone()
    checkpoint["sparsepilot"]["shapes"][name] = [256, 16]
    return "[256, 16]"


def another_program(checkpoint: dict[str, Any]) -> str:
    del checkpoint["sparsepilot"]
    return "another program"


def another_version(checkpoint: dict[str, Any]) -> str:
    del checkpoint["state_dict"]["trainees.sae._extra_state"]["controller"]["strength"]
    return "another version of sparsepilot"


@pytest.mark.parametrize("alter", [another_architecture, another_shape, another_program, another_version])
def test_a_checkpoint_of_another_run_is_an_error(
    lab: Lab, tmp_path: Path, alter: Callable[[dict[str, Any]], str]
) -> None:
    run = lab.broken(tmp_path / "run")
    _, newest = list_checkpoints(run.folder / "checkpoints")[0]
    checkpoint = torch.load(newest, weights_only=True)
    shown = alter(checkpoint)
    CrashSafeIO().save_checkpoint(checkpoint, newest)
    assert_one_clear_line(run.start(), shown)


# ------------------------------------------------------------ a full disk


@pytest.mark.parametrize(("file_bytes", "full"), [(100_000, "samples-000000012800.ckpt"), (14_000, "metrics.jsonl")])
def test_a_full_disk_loses_nothing_that_was_whole(lab: Lab, tmp_path: Path, file_bytes: int, full: str) -> None:
    """No file may grow past `file_bytes`: the system refuses the write half-way, as it does on a full disk."""
    run = lab.broken(tmp_path / "run")
    checkpoints = list_checkpoints(run.folder / "checkpoints")

    def on_a_full_disk(arguments: list[str], environment: Mapping[str, str]) -> Ended:
        return lab.warm(arguments, environment, file_bytes=file_bytes)

    full_disk = lab.run(run.folder, launcher=on_a_full_disk)
    assert_one_clear_line(full_disk.start(), full, "the disk is full")
    assert list_checkpoints(run.folder / "checkpoints") == checkpoints
    assert all(is_whole(path) for _, path in checkpoints)
    assert list(run.folder.rglob("*.tmp")) == []
    assert_ends_equal(run)
