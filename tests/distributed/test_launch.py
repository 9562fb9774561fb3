"""`python train.py trainer=ddp_gloo`: it starts its ranks itself, and whatever becomes of one of them is said once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from killing.compare import run_differences
from killing.ranks import Ranks
from killing.runs import RunUnderTest
from warm import Warm

from sparsepilot.rows import read_rows

pytestmark = [
    pytest.mark.slow,  # a dozen processes, some of which import torch
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and signals as POSIX has them"),
]
TWO = ("trainer=ddp_gloo", "trainer.devices=2")


def begin(run: RunUnderTest) -> subprocess.Popen[str]:
    """Starts, and waits until it has taken a step."""
    began_s = time.time()
    process = subprocess.Popen(
        [sys.executable, "train.py", *run._options, *TWO],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/benchmarks{os.pathsep}{ROOT}/src", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until_s = time.monotonic() + 120
    while max((row["time"] for row in read_rows(run.folder / "timing.jsonl")), default=0) < began_s:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until_s
        time.sleep(0.01)
    return process


def test_what_becomes_of_ranks_and_of_the_process_that_started_them(warm: Warm, tmp_path: Path) -> None:
    reference = RunUnderTest(tmp_path / "unbroken", tmp_path / "cache", launcher=Ranks(2, "ddp_gloo", warm.ranks))
    assert reference.start().code == 0
    # all forked; below two starts are from nothing
    run = RunUnderTest(tmp_path / "run", tmp_path / "cache", reference=reference.folder, launcher=warm)

    began_s = time.monotonic()
    ended = run.start({"SPARSEPILOT_FAULT": "mid-step:33@1"}, TWO)
    assert time.monotonic() - began_s < 60
    assert ended.code == 128 + signal.SIGKILL
    errors = [line for line in ended.out.splitlines() if "rror" in line]
    assert errors == ["error: rank 1 was ended by SIGKILL; the same line again goes on from the last checkpoint"]
    assert run.resumes_at == 30

    process = begin(run)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.count("stopped and saved at") == 1
    assert 30 < (stopped := run.resumes_at) < 120

    process = begin(run)
    process.kill()  # nobody is there to hand signals on: the ranks see that they are alone, and stop by themselves
    out, _ = process.communicate(timeout=60)  # until the last of them has closed its output
    assert out.count("stopped and saved at") == 1, out
    assert run.resumes_at > stopped

    ended = run.start(more=TWO)
    assert ended.code == 0, ended.out
    assert f"resuming {run.folder} at" in ended.out
    assert run_differences(reference.folder, run.folder) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.d_sae=-3",), "error: model.d_sae = -3: should be greater than 0"),
        (("data=cache", "data.sites=[a]"), "error: cache/none: no activation cache here"),
        (("data.val_rows=1",), "error: cache: 1 validation rows for 2 ranks; each rank needs at least one"),
        (("run_dir=a_file/run",), "error: run_dir = a_file/run: no folder can be made there (Not a directory)"),
    ],
)
def test_an_error_is_said_once(warm: Warm, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    (tmp_path / "a_file").touch()
    arguments = [str(ROOT / "train.py"), *TINY, "data.path=cache", "run_dir=run", *TWO]
    if "data=cache" in overrides:
        arguments = [str(ROOT / "train.py"), "data.path=cache/none", "run_dir=run", *TWO]
    done = warm.script([*arguments, *overrides], tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert "result" not in done.stdout


def test_a_mistake_that_rank_0_has_not_found_is_said_by_who_has(warm: Warm, tmp_path: Path) -> None:
    """Another node, another disk: rank 0 goes on to where the ranks meet, and waits."""
    arguments = [str(ROOT / "train.py"), *TINY, "data.path=cache", "run_dir=run", "model.d_sae=-3"]
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = warm.script(arguments, tmp_path, **second)
    assert (done.returncode, done.stderr) == (2, "error: model.d_sae = -3: should be greater than 0\n")
