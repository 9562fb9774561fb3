"""A real Slurm of two nodes on this machine: jobs train, are stopped, killed and requeued, and end as unbroken ones."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from killing.compare import run_differences
from killing.runs import BASE, BATCH

from sparsepilot.rows import read_rows

NEEDED = ("sbatch", "slurmctld", "slurmd", "munged", "runuser")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slow,  # real jobs; a requeued one waits for Slurm's own delay
    pytest.mark.timeout(1500),  # ... and two minutes each; a second test process waits for the first one's cluster
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root, slurm-wlm, munge; missing: {MISSING}"),
]
STEPS = 400
CLUSTER = str(ROOT / "tests" / "slurm" / "cluster.sh")


def wait_for(what: str, happened: Callable[[], Any], timeout_s: float = 120) -> Any:
    """Polls until `happened()` is true, and returns it."""
    until_s = time.monotonic() + timeout_s
    while not (found := happened()):
        assert time.monotonic() < until_s, f"no {what} after {timeout_s} s"
        time.sleep(0.02)
    return found


class Slurm:
    """The cluster, and jobs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([CLUSTER, "start", str(folder / "slurm")], check=True, timeout=60)
        self.env = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
            "PYTHONPATH": f"{ROOT}/benchmarks{os.pathsep}{ROOT}/src",
            "SPARSEPILOT_VENV": sys.prefix,
        }

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, cwd=ROOT, env=self.env, check=True, capture_output=True, text=True).stdout

    def train(self, *options: str, sbatch: tuple[str, ...] = ("--nodes=2", "--ntasks-per-node=1")) -> Job:
        """Submits slurm/train.sbatch."""
        own = (f"data.path={self.folder}/cache", f"run_dir={self.folder}/${{run_id:}}", "threads=1")
        cpu = ("trainer.accelerator=cpu", f"samples={STEPS * BATCH}")
        job = self.ask(
            "sbatch", "--parsable", f"--output={self.folder}/%j.out", *sbatch, "slurm/train.sbatch",
            *BASE, *own, *cpu, *options,
        )  # fmt: skip
        return Job(self, job.strip())


class Job:
    """One job, over all of its starts."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm, self.number = slurm, number
        self.folder, self.output = slurm.folder / number, slurm.folder / f"{number}.out"

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    @property
    def state(self) -> str:
        """Slurm's word for it."""
        found = re.search(r"JobState=(\w+)", self.slurm.ask("scontrol", "show", "job", self.number))
        assert found is not None
        return found[1]

    def wait(self, state: str, timeout_s: float = 120) -> None:
        """Until it is in that state."""
        wait_for(f"{state} of job {self.number}", lambda: self.state == state, timeout_s)

    def wait_for_a_step(self) -> None:
        """Until it has taken a step since now."""
        now = time.time()
        wait_for("step", lambda: max((r["time"] for r in read_rows(self.folder / "timing.jsonl")), default=0.0) > now)

    def process(self, rank: int) -> int:
        """The training process of a rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            wanted = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()}
            if b"train.py" in words and b"srun" not in words[0] and wanted <= set(environment):
                return int(folder.name)
        raise AssertionError(f"job {self.number} has no rank {rank}")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with open(Path(tempfile.gettempdir()) / "sparsepilot-slurm.lock", "w") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        folder = Path(tempfile.mkdtemp(prefix="sparsepilot-slurm-"))  # not pytest's: munge's user may not enter that
        folder.chmod(0o755)
        made = Slurm(folder)
        try:
            yield made
        finally:
            subprocess.run(["scancel", "--user=root"], env=made.env, check=False)
            time.sleep(1)
            subprocess.run([CLUSTER, "stop", str(folder / "slurm")], check=False, timeout=60)
            time.sleep(1)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def unbroken(slurm: Slurm) -> Path:
    job = slurm.train()
    job.wait("COMPLETED")
    assert job.out.count("planted features recovered") == 1  # one rank talks
    return job.folder


def test_two_tasks_on_one_node_train_as_on_two(slurm: Slurm, unbroken: Path) -> None:
    job = slurm.train(sbatch=("--nodes=1", "--ntasks-per-node=2"))
    job.wait("COMPLETED")
    assert run_differences(unbroken, job.folder) == []


def test_usr1_saves_and_requeues_and_the_job_goes_on(slurm: Slurm, unbroken: Path) -> None:
    job = slurm.train()
    job.wait_for_a_step()
    slurm.ask("scancel", "--signal=USR1", job.number)
    wait_for("end of the first start", lambda: "goes back into the queue" in job.out)
    job.wait("COMPLETED", 300)
    assert job.out.count("stopped and saved at") == 1
    assert job.out.count(f"job {job.number} goes back into the queue") == 1
    assert job.out.count(f"resuming {job.folder} at") == 1
    assert run_differences(unbroken, job.folder) == []


def test_a_killed_rank_ends_the_job_and_a_requeued_job_goes_on(slurm: Slurm, unbroken: Path) -> None:
    job = slurm.train()
    job.wait_for_a_step()
    os.kill(job.process(rank=1), signal.SIGKILL)
    job.wait("FAILED", 60)
    assert "another rank of this run is gone" in job.out or "Killed" in job.out
    assert "Traceback" not in job.out
    slurm.ask("scontrol", "requeue", job.number)
    job.wait("COMPLETED", 300)
    assert run_differences(unbroken, job.folder) == []


def test_an_error_of_all_tasks_is_said_once(slurm: Slurm) -> None:
    job = slurm.train("model.k=0")
    job.wait("FAILED")
    assert [line for line in job.out.splitlines() if line.startswith("error:")] == [
        "error: model.k = 0: should be greater than 0"
    ]
    slurm.env["SPARSEPILOT_VENV"], before = "/nowhere", slurm.env["SPARSEPILOT_VENV"]
    job = slurm.train()
    slurm.env["SPARSEPILOT_VENV"] = before
    job.wait("FAILED")
    assert job.out == "error: /nowhere: no Python environment there; run `make setup`, or set SPARSEPILOT_VENV\n"
