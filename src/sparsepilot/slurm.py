"""What a job says to the Slurm that it runs under, and which signals ask it to leave. No torch here.

Before a time limit, or to make room for another job, Slurm sends a signal: the one that `--signal` names, or SIGTERM. A
job that is back in the queue starts again by the same line and goes on in its run folder.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import Any

from sparsepilot.ranks import is_first

asked_early: list[int] = []
"""Signals that came before training could act on them, on a rank that cannot act by itself."""
queued_again: list[str] = []
"""The job's number, once this process has put it back into the queue."""


def job() -> str | None:
    """The job that this process belongs to, `<array job>_<task>` in an array; None outside of Slurm."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    return env.get("SLURM_JOB_ID")


def was_requeued() -> bool:
    """Whether this is not the job's first start."""
    return job() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def by_submitit() -> bool:
    """Whether submitit, the launcher of a sweep, has submitted this job."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def leave_signals() -> tuple[signal.Signals, ...]:
    """Those that mean "save, and go back into the queue": SIGUSR1, and what submitit has Slurm send."""
    if not by_submitit():
        return (signal.SIGUSR1,)
    name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    return tuple(dict.fromkeys((signal.SIGUSR1, signal.Signals[f"SIG{name}"])))


def stop_signals() -> tuple[signal.Signals, ...]:
    """All that a run answers by saving and leaving."""
    return (signal.SIGINT, signal.SIGTERM, *leave_signals())


def belongs_back(number: int) -> bool:
    """Whether a job that got this signal should be queued again.

    SIGTERM alone does not say: `scancel` sends it, and so does Slurm to a job that has to make room and is given a
    while for it (GraceTime). One that ends in that while would count as completed, and nobody would start it again.
    """
    if job() is None or number == signal.SIGINT:
        return False
    return number in leave_signals() or makes_room()


def makes_room() -> bool:
    """Whether Slurm has told this job to make room for another one."""
    told = re.search(r"\bPreemptTime=(\S+)", _scontrol("show", "job", os.environ["SLURM_JOB_ID"]).stdout)
    return told is not None and told[1] != "None"


def requeue() -> None:
    """Has Slurm put this job back into its queue; says so first, as Slurm ends what is left of it at once."""
    name = job()
    assert name is not None
    print(f"job {name} goes back into the queue", flush=True)
    queued_again.append(name)
    for pause_s in PAUSES_S:
        time.sleep(pause_s)
        done = _scontrol("requeue", name)
        if done.returncode == 0:
            return
    queued_again.clear()
    print(f"job {name} could not be put back into the queue: {' '.join(done.stderr.split())}", flush=True)


PAUSES_S = (0.0, 2.0, 2.0)
"""Before each request to put a job back: slurmctld has much to do where many jobs leave at once."""


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def ignore(*numbers: int) -> None:
    """From now on these do nothing: a second one must not cut short what the first one began."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def leave_during_start_up() -> None:
    """Until training takes the signals over there is nothing to save: rank 0 puts the job back at once and all leave.

    Without this a job whose limit comes while it builds a cache would end there. It also takes submitit's own handlers
    out of the way, which requeue by themselves.
    """
    if job() is not None:
        for number in (signal.SIGTERM, *leave_signals()):
            signal.signal(number, _leave)


def end_when_told() -> None:
    """For a rank that has found a mistake and waits for rank 0 to say it: SIGTERM ends it, one that has come, too.

    `srun --kill-on-bad-exit` sends that as soon as rank 0 has ended, and SIGKILL only after Slurm's KillWait, half a
    minute by default.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.SIGTERM in asked_early:
        os.kill(os.getpid(), signal.SIGTERM)


def _leave(number: int, frame: Any) -> None:
    if not is_first():
        asked_early.append(number)  # rank 0 was told the same, or training will tell it at the first step
        return
    ignore(signal.SIGTERM, *leave_signals())
    if belongs_back(number):
        requeue()
        # an exception would be raised wherever the process stands, and be caught there, perhaps
        os._exit(0 if queued_again else 128 + number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
