"""What the pictures are built from: a row's key over a clock, and the axes that several of them share."""

from __future__ import annotations

from typing import Literal

from sparsepilot.reporting.figure import Axis, Line, Role
from sparsepilot.reporting.runs import Run
from sparsepilot.reporting.thin import thin

Clock = Literal["samples_M", "samples", "step"]


def line(
    run: Run,
    name: str,
    role: Role,
    x: Clock,
    key: str,
    *,
    kind: Literal["line", "points"] = "line",
    positive: bool = False,
    log_x: bool = False,
    end_dot: bool = False,
) -> Line:
    """The rows' values of `key` over a clock, thinned; `positive` for a log axis. Empty where no row has the key."""
    clock, values = run.series("samples" if x == "samples_M" else x, key, positive=positive)
    if x == "samples_M":
        clock = [samples / 1e6 for samples in clock]
    shown_x, shown_y = thin(clock, values, log_x=log_x)
    num_points = len(clock) if len(shown_x) < len(clock) else 0
    return Line(name, role, shown_x, shown_y, kind=kind, end_dot=end_dot, num_points=num_points)


def absent(run: Run, key: str) -> str | None:
    """What a panel says that has no row with `key`."""
    if run.has(key):
        return None
    return f"no {key} in the rows" + ("" if run.rows else ": the run has none yet")


def over_millions(run: Run) -> Axis:
    """Samples in millions, linear, from 0 to the budget."""
    return Axis("samples (M)", 0.0, run.budget_samples / 1e6)


def over_steps(run: Run) -> Axis:
    """Training steps, linear, from 0 to the end of the budget."""
    return Axis("training step", 0.0, float(run.budget_samples // run.batch), most_ticks=5)
