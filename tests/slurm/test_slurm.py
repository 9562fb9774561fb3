"""A real Slurm of two nodes on this machine: jobs train, are stopped, killed and requeued, and end as unbroken ones."""

from __future__ import annotations

import contextlib
import fcntl
import json
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
from warm import Warm

from sparsepilot.callbacks.checkpoint_io import list_checkpoints
from sparsepilot.data.cache import Cache
from sparsepilot.data.layout import marker_file
from sparsepilot.errors import DataError
from sparsepilot.rows import read_rows
from sparsepilot.sweep_folder import SweepFolder

NEEDED = ("sbatch", "slurmctld", "slurmd", "munged", "runuser")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slow,  # real jobs; a requeued one waits for Slurm's own delay
    pytest.mark.timeout(1500),  # ... and two minutes each; a second test process waits for the first one's cluster
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root, slurm-wlm, munge; missing: {MISSING}"),
]
STEPS = 120
CLUSTER = str(ROOT / "tests" / "slurm" / "cluster.sh")


def wait_for(what: str, happened: Callable[[], Any], timeout_s: float = 300) -> Any:
    """Polls until `happened()` is true, and returns it."""
    until_s = time.monotonic() + timeout_s
    while not (found := happened()):
        assert time.monotonic() < until_s, f"no {what} after {timeout_s} s"
        time.sleep(0.02)
    return found


def wait_for_a_step(run: Path) -> None:
    """Until a run has taken a step since now."""
    now = time.time()
    wait_for("step", lambda: max((r["time"] for r in read_rows(run / "timing.jsonl")), default=0.0) > now)


def starts(run: Path) -> list[dict[str, Any]]:
    """What a run folder says about the times that it was started."""
    return list(json.loads((run / "run.json").read_text(encoding="utf-8"))["starts"])


class Slurm:
    """The cluster, and jobs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([CLUSTER, "start", str(folder / "slurm")], check=True, timeout=60)
        self.slow = folder / "slow"
        """while it is there, steps take longer (killing/targets.py)"""
        self.env = {
            **os.environ,
            "KILLING_SLOW": f"1:{self.slow}",
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
            "PYTHONPATH": f"{ROOT}/benchmarks{os.pathsep}{ROOT}/src",
            "SPARSEPILOT_VENV": sys.prefix,
        }

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, cwd=ROOT, env=self.env, check=True, capture_output=True, text=True).stdout

    def submit(self, *words: str) -> Job:
        """sbatch."""
        return Job(self, self.ask("sbatch", "--parsable", f"--output={self.folder}/%j.out", *words).strip())

    def train(self, *options: str, sbatch: tuple[str, ...] = ("--nodes=2", "--ntasks-per-node=1")) -> Job:
        """Submits slurm/train.sbatch."""
        words = (*self.options(), f"run_dir={self.folder}/${{run_id:}}", "trainer.accelerator=cpu", *options)
        return self.submit(*sbatch, "slurm/train.sbatch", *words)

    def options(self) -> tuple[str, ...]:
        """What all trainings here share."""
        return (*BASE, f"data.path={self.folder}/cache", "threads=1", f"samples={STEPS * BATCH}")

    def hurry(self, job: str) -> None:
        """A job that is back in the queue need not wait the two minutes that Slurm gives its nodes to recover.

        They are for what is left of the start before: a node refuses what was signed before it revoked the job, and the
        end of the old script may be taken for that of the new one. So nothing of it may be left.
        """
        wait_for(f"requeue of {job}", lambda: self.shown(job, "JobState") == "PENDING")
        wait_for(f"end of what ran of {job}", lambda: not self.remains(self.shown(job, "JobId")))
        time.sleep(2)  # Slurm counts in seconds
        until_s = time.monotonic() + 15  # Slurm may put it off once more when it hears of that end
        while time.monotonic() < until_s and self.shown(job, "JobState") == "PENDING":
            with contextlib.suppress(subprocess.CalledProcessError):  # it has just started
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.5)

    def remains(self, number: str) -> list[bytes]:
        """The processes of a job, Slurm's own for it among them."""
        stepd, variable, found = f"slurmstepd: [{number}.".encode(), f"SLURM_JOB_ID={number}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (folder / "cmdline").read_bytes()
                if words.startswith(stepd) or variable in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(words)
        return found

    def processes(self, script: bytes, **environment: str) -> list[int]:
        """Those that run a script of ours with these variables."""
        wanted, found = {f"{name}={value}".encode() for name, value in environment.items()}, []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if script in words and b"srun" not in words[0]:
                    found += [int(folder.name)] if wanted <= set((folder / "environ").read_bytes().split(b"\0")) else []
        return found

    def shown(self, job: str, field: str) -> str:
        """A field of what Slurm says about a job."""
        found = re.search(rf"\b{field}=(\S+)", self.ask("scontrol", "show", "job", job))
        assert found is not None
        return found[1]


class Job:
    """One job, over all of its starts."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm, self.number = slurm, number
        self.folder = slurm.folder / number

    @property
    def out(self) -> str:
        """What it has printed so far."""
        output = Path(self.slurm.shown(self.number, "StdOut"))
        return output.read_text(encoding="utf-8") if output.exists() else ""

    @property
    def state(self) -> str:
        """Slurm's word for it."""
        return self.slurm.shown(self.number, "JobState")

    def wait(self, state: str, timeout_s: float = 300) -> None:
        """Until it is in that state."""
        try:
            wait_for(f"{state} of job {self.number}", lambda: self.state == state, timeout_s)
        except AssertionError as error:
            asked = (("scontrol", "show", "job", self.number), ("sinfo", "-R", "-l"))
            logs = [
                path.read_text(encoding="utf-8")[-5000:] for path in sorted((self.slurm.folder / "slurm").glob("*.log"))
            ]
            told = [*(self.slurm.ask(*words) for words in asked), self.out, *logs]
            raise AssertionError("\n".join([str(error), *told])) from None

    def wait_for_a_step(self) -> None:
        """Until it has taken a step since now."""
        wait_for_a_step(self.folder)

    def processes(self, rank: int) -> list[int]:
        """The training processes of a rank."""
        return self.slurm.processes(b"train.py", SLURM_JOB_ID=self.number, SLURM_PROCID=str(rank))

    def process(self, rank: int) -> int:
        """The training process of a rank."""
        found = self.processes(rank)
        assert found, f"job {self.number} has no rank {rank}"
        return found[0]


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
def two_runs(slurm: Slurm) -> tuple[Path, Path]:
    """Unbroken ones, on two nodes and on one."""
    jobs = slurm.train(), slurm.train(sbatch=("--nodes=1", "--ntasks-per-node=2"))
    for job in jobs:
        job.wait("COMPLETED")
        assert job.out.count("planted features recovered") == 1  # one rank talks
    return jobs[0].folder, jobs[1].folder


@pytest.fixture(scope="module")
def unbroken(two_runs: tuple[Path, Path]) -> Path:
    return two_runs[0]


def test_two_tasks_on_one_node_train_as_on_two(two_runs: tuple[Path, Path]) -> None:
    assert run_differences(*two_runs) == []


def test_a_job_goes_on_after_all_that_may_end_it(slurm: Slurm, unbroken: Path) -> None:
    """SIGUSR1, a requeue by hand, a more urgent job, a time limit: one job meets all of them."""
    slurm.slow.touch()
    two_nodes = ("--nodes=2", "--ntasks-per-node=1", "--time=60", "--signal=USR1@50")
    job = slurm.train(sbatch=two_nodes)

    job.wait_for_a_step()
    slurm.ask("scancel", "--signal=USR1", job.number)
    slurm.hurry(job.number)
    assert job.out.count("stopped and saved at") == 1

    job.wait_for_a_step()
    slurm.ask("scontrol", "requeue", job.number)
    slurm.hurry(job.number)

    job.wait_for_a_step()
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    wait_for("more room", lambda: "goes back" in job.out.rpartition("resuming")[2])  # Slurm has sent SIGTERM, not USR1
    urgent.wait("COMPLETED")
    slurm.hurry(job.number)

    job.wait_for_a_step()
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")  # a minute since it started
    wait_for("end of the time", lambda: job.out.count("goes back into the queue") == 3)
    wait_for("requeue", lambda: job.state == "PENDING")
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    slurm.slow.unlink()
    slurm.hurry(job.number)

    job.wait("COMPLETED")
    assert job.out.count(f"job {job.number} goes back into the queue") == 3
    begun = [start["samples"] for start in starts(job.folder)]
    assert len(begun) == 5
    assert begun == sorted(set(begun))  # each went on where the one before had come to
    assert job.out.count(f"resuming {job.folder} at") == 4
    assert {start["slurm_job"] for start in starts(job.folder)} == {job.number}
    assert run_differences(unbroken, job.folder) == []


def test_a_killed_rank_ends_the_job_and_a_requeued_job_goes_on(slurm: Slurm, unbroken: Path) -> None:
    """kill -9 of one rank: in start-up, before the ranks have met; between two steps; half-way through a checkpoint."""
    # of the run's twelve saves the seventh; the start after that one has six left and meets no seventh
    fault = slurm.folder / "fault.log"
    exported = f"--export=ALL,SPARSEPILOT_FAULT=checkpoint-rename:7@0,SPARSEPILOT_FAULT_LOG={fault}"
    job = slurm.train(sbatch=("--nodes=2", "--ntasks-per-node=1", exported))

    def fails(times: int) -> None:
        job.wait("FAILED", 60)
        said = [line for line in job.out.splitlines() if "another rank of this run is gone" in line or "Killed" in line]
        assert len(said) >= times, job.out
        assert "Traceback" not in job.out

    def goes_on() -> None:
        slurm.ask("scontrol", "requeue", job.number)
        slurm.hurry(job.number)

    os.kill(wait_for("process of rank 1", lambda: job.processes(rank=1))[0], signal.SIGKILL)
    fails(1)
    assert list_checkpoints(job.folder / "checkpoints") == []

    slurm.slow.touch()
    goes_on()
    job.wait_for_a_step()
    os.kill(job.process(rank=1), signal.SIGKILL)
    slurm.slow.unlink()
    fails(2)

    goes_on()
    wait_for("kill", fault.exists)
    fails(3)
    half = list((job.folder / "checkpoints").glob("*.tmp"))
    assert len(half) == 1
    assert starts(job.folder)[-1]["samples"] < list_checkpoints(job.folder / "checkpoints")[0][0]

    goes_on()
    job.wait("COMPLETED")
    assert run_differences(unbroken, job.folder) == []


@pytest.mark.parametrize(
    ("trainer", "here"),
    [
        (("multinode_fsdp",), ("fsdp_cpu",)),
        (("multinode_feature_parallel", "trainer.strategy.features=2"), ("feature_parallel_cpu",)),
    ],
    ids=["fsdp", "feature_parallel"],
)
def test_a_dictionary_divided_over_two_nodes_survives_them(
    slurm: Slurm, warm: Warm, tmp_path: Path, trainer: tuple[str, ...], here: tuple[str, ...]
) -> None:
    """Each node writes its part of a checkpoint; a signal and a rank that was killed change nothing."""
    slurm.slow.touch()
    job = slurm.train(f"trainer={trainer[0]}", *trainer[1:])
    own = (f"run_dir={tmp_path}", f"trainer={here[0]}", *here[1:])
    alone = warm.ranks(2, ["train.py", *slurm.options(), *own], {})
    assert [ended.code for ended in alone] == [0, 0], alone[0].out

    job.wait_for_a_step()
    slurm.ask("scancel", "--signal=USR1", job.number)
    slurm.hurry(job.number)
    job.wait_for_a_step()
    os.kill(job.process(rank=0), signal.SIGKILL)
    slurm.slow.unlink()
    job.wait("FAILED", 60)
    assert "Traceback" not in job.out
    slurm.ask("scontrol", "requeue", job.number)
    slurm.hurry(job.number)
    job.wait("COMPLETED")
    assert job.out.count("stopped and saved at") == 1
    assert job.out.count(f"resuming {job.folder} at") == 2
    assert run_differences(tmp_path, job.folder) == []


def test_an_error_of_all_tasks_is_said_once(slurm: Slurm) -> None:
    (slurm.folder / "a_file").touch()
    place = slurm.folder / "a_file" / "run"
    words = ("model.k=0", f"run_dir={place}")
    jobs = [slurm.train(word) for word in words]
    slurm.env["SPARSEPILOT_VENV"], before = "/nowhere", slurm.env["SPARSEPILOT_VENV"]
    homeless = slurm.train()
    slurm.env["SPARSEPILOT_VENV"] = before
    said = []
    for job in jobs:
        job.wait("FAILED")
        wait_for("what it says", lambda job=job: "error:" in job.out, 30)  # srun may write after the job has ended
        said.append([line for line in job.out.splitlines() if line.startswith("error:")])
    assert said == [
        ["error: model.k = 0: should be greater than 0"],
        [f"error: run_dir = {place}: no folder can be made there (Not a directory); name another"],
    ]
    homeless.wait("FAILED")
    assert homeless.out == "error: /nowhere: no Python environment there; run `make setup`, or set SPARSEPILOT_VENV\n"


def test_an_array_writes_a_cache_and_a_killed_task_goes_on(slurm: Slurm, warm: Warm) -> None:
    words = [word for word in BASE if word.startswith("data")]
    words += [
        "+data.build.chunk_rows=64",
        "+data.build.shard_rows=1088",
    ]  # 20 shards of five writes, five for each task
    warm.script(["scripts/cache_activations.py", *words, f"data.path={slurm.folder}/alone"]).check_returncode()
    shared = slurm.folder / "shared"
    array = slurm.submit(
        "--array=2-5", "--export=ALL,SPARSEPILOT_FAULT=cache-shard-write:18@3",
        "slurm/cache.sbatch", *words, f"data.path={shared}",
    )  # fmt: skip
    tasks = [Job(slurm, f"{array.number}_{number}") for number in range(2, 6)]
    killed, signalled = tasks[1], tasks[3]

    wait_for("task", lambda: slurm.processes(b"scripts/cache_activations.py", SLURM_ARRAY_TASK_ID="5"))
    slurm.ask("scancel", "--batch", "--signal=USR1", signalled.number)  # as a minute before a time limit
    slurm.hurry(signalled.number)
    killed.wait("FAILED")
    mine = {number: marker_file(shared, number) for number in range(1, 20, 4)}
    whole = {number: path.stat().st_mtime_ns for number, path in mine.items() if path.exists()}
    assert list(whole) == [1, 5, 9], killed.out
    with pytest.raises(DataError, match="unfinished"):
        Cache(shared)

    slurm.ask("scontrol", "requeue", killed.number)
    slurm.hurry(killed.number)
    for task in tasks:
        task.wait("COMPLETED")
    assert {number: mine[number].stat().st_mtime_ns for number in whole} == whole  # it wrote its other two alone
    assert Cache(shared).fingerprint == Cache(slurm.folder / "alone").fingerprint
    assert signalled.out.count("goes back into the queue") == 1


SWEEP = ("hydra/launcher=slurm", "model.k=4,4,0,5", "trainer.accelerator=cpu", "threads=1")


def test_a_sweep_of_four_jobs_with_one_that_fails_and_one_that_is_preempted(slurm: Slurm) -> None:
    sweep = slurm.folder / "sweep"
    own = (f"hydra.sweep.dir={sweep}", f"data.path={slurm.folder}/sweep-cache")  # all four want it at once
    slurm.slow.touch()
    command = [sys.executable, "train.py", "-m", *SWEEP, *(word for word in BASE if word != "model.k=4"), *own]
    out = slurm.folder / "sweep.out"
    with open(out, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=slurm.env, stdout=file, stderr=subprocess.STDOUT)
    wait_for("run", lambda: process.poll() is not None or (sweep / "0" / "run.json").exists(), 300)
    wait_for_a_step(sweep / "0")
    first = starts(sweep / "0")[0]["slurm_job"]
    slurm.ask("scancel", "--signal=USR2", first)  # what submitit asks Slurm for before a time limit
    slurm.hurry(first)
    slurm.slow.unlink()
    assert process.wait(600) == 1, out.read_text()

    said = out.read_text()
    assert said.count(f"sweep {sweep}: 3 of 4 members are done") == 1
    assert [line for line in said.splitlines() if line.startswith("failed: ")] == [
        "failed: member 2 (model.k=0): model.k = 0: should be greater than 0"
    ]
    assert "Traceback" not in said
    found = {member.number: (member.status, member.error) for member in SweepFolder(sweep).members()}
    assert found == {
        0: ("done", None),
        1: ("done", None),
        2: ("failed", "model.k = 0: should be greater than 0"),
        3: ("done", None),
    }
    assert [len(starts(sweep / str(number))) for number in (0, 1, 3)] == [2, 1, 1]  # requeued once, not twice
    assert starts(sweep / "0")[1]["samples"] > 0
    logs = "".join(path.read_text() for path in sorted((sweep / ".submitit").rglob("*_log.out")))
    assert logs.count("goes back into the queue") == 1
    assert logs.count("building the activation cache") == 1
    assert run_differences(sweep / "1", sweep / "0") == []  # the same options, never broken
