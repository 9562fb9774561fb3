"""What the pictures are built from: a row's key over a clock, and the axes that several of them share."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

from sparsepilot.reporting.figure import Axis, Line, Role
from sparsepilot.reporting.runs import Run, finite
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
    """The rows' values of `key` over a clock, thinned. What is not finite is a gap in a line; with `positive`, for a
    log axis, also what is not above 0. Empty where no row has such a value."""
    clock, values = run.series("samples" if x == "samples_M" else x, key, positive=positive)
    if x == "samples_M":
        clock = [samples / 1e6 for samples in clock]
    shown_x, shown_y = thin(clock, values, log_x=log_x)
    num_points = len(clock) if len(shown_x) < len(clock) else 0
    if kind == "line":
        place, per = ("samples", 1e6) if x == "samples_M" else (x, 1)
        rows = [row for row in run.rows if key in row]
        gaps = [row[place] / per for row in rows if not finite(row[key]) or (positive and row[key] <= 0)]
        shown_x, shown_y = _with_gaps(shown_x, shown_y, gaps)
    return Line(name, role, shown_x, shown_y, kind=kind, end_dot=end_dot, num_points=num_points)


def _with_gaps(x: list[float], y: list[float], gaps: Sequence[float]) -> tuple[list[float], list[float]]:
    """The line broken at the places of `gaps`, once between two points that it joins.

    >>> _with_gaps([1, 2, 5], [7, 8, 9], [0, 3, 4, 6])
    ([1, 2, 3, 5], [7, 8, nan, 9])
    """
    between: dict[int, float] = {}
    for gap in gaps:
        between.setdefault(bisect_left(x, gap), gap)
    broken_x, broken_y = [], []
    for i in range(len(x)):
        if i > 0 and i in between:
            broken_x.append(between[i])
            broken_y.append(math.nan)
        broken_x.append(x[i])
        broken_y.append(y[i])
    return broken_x, broken_y


def zeros(run: Run, what: str, *keys: str) -> list[str]:
    """What a panel with a log axis notes about values of 0, which it cannot show."""
    values = [v for key in keys for v in run.series("step", key)[1]]
    if not values or min(values) > 0:
        return []
    return [f"{what} was 0 throughout" if max(values) <= 0 else f"gap: {not_drawn(what)}"]


def not_drawn(what: str) -> str:
    """Why a log axis lacks a value of 0.

    >>> not_drawn("L0")
    'L0 was 0, not drawn on a log axis'
    """
    return f"{what} was 0, not drawn on a log axis"


def absent(run: Run, key: str) -> str | None:
    """What a panel says that has no row with `key`."""
    if run.has(key):
        return None
    return f"no {key} in the rows" + ("" if run.rows else ": the run has none yet")


def undrawable(run: Run, key: str, notes: Sequence[str]) -> str:
    """What a panel with a log axis says that has no line of `key`: that no row has it, or the first of its notes."""
    return absent(run, key) or [*notes, f"no finite {key} in the rows"][0]


def over_millions(run: Run) -> Axis:
    """Samples in millions, linear, from 0 to the budget."""
    return Axis("samples (M)", 0.0, run.budget_samples / 1e6)


def over_steps(run: Run) -> Axis:
    """Training steps, linear, from 0 to the end of the budget."""
    return Axis("training step", 0.0, float(run.budget_samples // run.batch), most_ticks=5)
