"""Named places where a test may kill the process, so that crash safety is tested at the exact instant that matters.

`SPARSEPILOT_FAULT="checkpoint-write:3"` sends SIGKILL to this process the third time it passes
`point("checkpoint-write")`; `checkpoint-write:3@1` only where it is rank 1 of several, or task 1 of a Slurm array.
Unset, a point is one dictionary look-up. `SPARSEPILOT_FAULT_LOG=<file>` appends the name of the point that fired, so
that a campaign can tell where its kills fell.
"""

from __future__ import annotations

import os
import signal

_passed: dict[str, int] = {}


def is_armed(name: str) -> bool:
    """Whether the environment asks for a kill at `name`: for places that must act differently to be killed in."""
    return _armed(name) is not None


def _armed(name: str) -> int | None:
    """Which passing of `name` is the one to die at; None where none is."""
    wanted = os.environ.get("SPARSEPILOT_FAULT")
    if not wanted:
        return None
    wanted, _, rank = wanted.partition("@")
    target, _, nth = wanted.partition(":")
    mine = os.environ.get("RANK") or os.environ.get("SLURM_ARRAY_TASK_ID")
    return int(nth or 1) if target == name and rank in ("", mine) else None


def point(name: str) -> None:
    """Dies here if the environment asks for it."""
    nth = _armed(name)
    if nth is None:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == nth:
        log = os.environ.get("SPARSEPILOT_FAULT_LOG")
        if log:
            with open(log, "a", encoding="utf-8") as file:
                file.write(name + "\n")
                file.flush()
                os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)
