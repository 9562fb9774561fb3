"""A process that takes one training step when told so: its end of the pipe, and what is worth noting of the machine.

The parent writes a line `go`; the worker takes a step and answers with one line of JSON; at the end of its input it
leaves. While it waits it is blocked in a read. Needs the standard library only.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Channel:
    """The worker's end. Takes stdout for itself: whatever else is printed in this process goes to stderr."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def told_to_go(self) -> bool:
        """Waits for the parent's word; False when there will be none."""
        return sys.stdin.readline() == "go\n"

    def answer(self, **values: Any) -> None:
        """One line for the parent."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def machine() -> dict[str, Any]:
    """Processor, memory pages, load and the variables that change how fast a step is."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "transparent_hugepage": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "loadavg": os.getloadavg(),
        "environment": {name: os.environ.get(name) for name in names},
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def _cpu_model() -> str:
    lines = (_text("/proc/cpuinfo") or "").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
