"""What a job asks of Slurm when a signal comes before training: once, by one rank, and only where it is due."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sparsepilot import slurm

SCONTROL = """#!/bin/sh
echo "$@" >> {log}
if [ "$1" = show ]; then echo "JobId=7 PreemptTime={preempt} Reason=None"; fi
if [ "$1" = requeue ] && [ -n "$refuse" ]; then echo no >&2; exit 1; fi
"""
JOB = """
import os, signal, sys, time
from sparsepilot import slurm
slurm.leave_during_start_up()
for number in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, number))
print("went on", slurm.asked_early)
"""
LAUNCHER = """
import os, signal, subprocess, sys, threading
from sparsepilot import launch
rank = subprocess.Popen(["sleep", "60"], text=True)  # does not listen yet
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
sys.exit(launch._watch([rank]).code)
"""


MISTAKEN = """
import os, signal, sys, threading
from sparsepilot import slurm
slurm.leave_during_start_up()
def end():
    os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "before":
    end()
from sparsepilot.config.cli import prepare, user_errors
from sparsepilot.errors import ConfigError
prepare(ranks_alike=True)
if sys.argv[1] == "while it waits":
    threading.Timer(0.5, end).start()
with user_errors():
    raise ConfigError("model.k = 0")
"""


def job(
    tmp_path: Path, *given: str, script: str = JOB, preempted: bool = False, **environment: str
) -> tuple[int, str, list[str]]:
    """A process of job 7 that gets these signals, or is told this: its exit status, what it printed, what it asked of
    Slurm."""
    log, program = tmp_path / "asked", tmp_path / "scontrol"
    program.write_text(SCONTROL.format(log=log, preempt="2026-01-01T00:00:00" if preempted else "None"))
    program.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), "SLURM_JOB_ID": "7"}
    command, env = [sys.executable, "-c", script, *given], {**os.environ, **path, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout, log.read_text().splitlines() if log.exists() else []


BACK = "job 7 goes back into the queue\n"
SECOND = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.slow  # a process each
def test_a_signal_before_training_puts_the_job_back_once(tmp_path: Path) -> None:
    assert job(tmp_path, "SIGUSR1", "SIGUSR1", "SIGTERM") == (0, BACK, ["requeue 7"])


@pytest.mark.slow  # a process each
def test_under_submitit_it_is_the_signal_that_submitit_has_sent(tmp_path: Path) -> None:
    submitit = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    back = BACK.replace("7", "6_2")
    assert job(tmp_path, "SIGUSR2", **submitit) == (0, back, ["requeue 6_2"])


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("preempted", [True, False])
def test_sigterm_means_later_only_where_slurm_wants_the_room(tmp_path: Path, preempted: bool) -> None:
    code, out, asked = job(tmp_path, "SIGTERM", preempted=preempted)
    assert asked == ["show job 7"] + ["requeue 7"] * preempted
    assert (code, out) == ((0, BACK) if preempted else (-15, ""))


@pytest.mark.slow  # a process each
def test_one_rank_asks_and_the_others_remember(tmp_path: Path) -> None:
    assert job(tmp_path, "SIGUSR1", "SIGTERM", **SECOND) == (0, "went on [10, 15]\n", [])


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("told", ["before", "while it waits"])
def test_a_rank_that_is_told_to_end_does_not_say_what_the_first_has_said(tmp_path: Path, told: str) -> None:
    assert job(tmp_path, told, script=MISTAKEN, **SECOND) == (-15, "", [])


@pytest.mark.slow  # a process each
def test_a_job_that_slurm_does_not_take_back_has_failed(tmp_path: Path) -> None:
    code, out, _ = job(tmp_path, "SIGUSR1", refuse="yes")
    assert code == 128 + 10
    assert "job 7 could not be put back into the queue: no" in out


@pytest.mark.slow  # two processes each
@pytest.mark.parametrize("refuse", ["", "yes"])
def test_ranks_that_a_signal_ends_before_they_listen_end_as_one_process_does(tmp_path: Path, refuse: str) -> None:
    code, out, asked = job(tmp_path, script=LAUNCHER, refuse=refuse)
    assert code == (128 + 10 if refuse else 0)
    assert asked[0] == "requeue 7"
    assert out.startswith(BACK)


@pytest.mark.slow  # a process
def test_train_py_answers_before_it_imports_hydra(tmp_path: Path) -> None:
    """On a cold network filesystem that import takes long; here the signal comes in the middle of it."""
    (tmp_path / "hydra.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n")
    log, program = tmp_path / "asked", tmp_path / "scontrol"
    program.write_text(SCONTROL.format(log=log, preempt="None"))
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, str(ROOT / "train.py")]
    done = subprocess.run(command, env={**env, "SLURM_JOB_ID": "7"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, BACK, "")
    assert log.read_text().splitlines() == ["requeue 7"]


def test_outside_of_slurm_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "SUBMITIT"))]:
        monkeypatch.delenv(name)
    assert slurm.job() is None
    assert not any(slurm.belongs_back(number) for number in slurm.stop_signals())
