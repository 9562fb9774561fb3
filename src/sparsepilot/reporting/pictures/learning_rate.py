"""The learning rate, of a run or of a schedule that nobody has run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from sparsepilot.reporting.build import absent, line
from sparsepilot.reporting.figure import Axis, Line, Panel, Picture, axis
from sparsepilot.reporting.runs import Run

PLACE = 5
NUM_PLACES = 2000


def draw(run: Run) -> Picture:
    """Learning rate (linear) over samples, written as 500M or 1G; a dot marks the end."""
    rate = line(run, "learning rate", "measured", "samples", "train/lr", end_dot=True)
    return _picture(rate, run.budget_samples, "Learning rate", absent(run, "train/lr"))


def draw_schedule(schedule: Callable[[int, int], float], total_samples: int, name: str) -> Picture:
    """The same picture from the schedule itself: (samples, total_samples) -> learning rate."""
    x, y = trace(lambda samples: schedule(samples, total_samples), total_samples)
    rate = Line("learning rate", "measured", x, y, end_dot=True)
    return _picture(rate, total_samples, f"Learning rate: schedule={name}", None)


def _picture(rate: Line, budget_samples: int, title: str, missing: str | None) -> Picture:
    # the reference's axis: 500M, 1G, 1.5G of 1.825G
    below = Axis("samples", 0.0, float(budget_samples), text="samples", most_ticks=5, zero_tick=False)
    beside = replace(axis("learning rate", [0.0, *rate.y], low=0.0), most_ticks=5)
    return Picture("learning_rate", title, [Panel("", below, beside, [rate] if rate.x else [], missing=missing)])


def trace(f: Callable[[int], float], end: int) -> tuple[list[float], list[float]]:
    """Points of `f` on [0, end] that show its jumps as jumps: both sides of each, one sample apart.

    >>> trace(lambda s: 1.0 if s < 777 else 0.5, 2000)[0][776:779]
    [776, 777, 778]
    >>> x, y = trace(lambda s: 1.0 if s < 123_457 else 0.5, 1_000_000)
    >>> [b for (a, u), (b, v) in zip(zip(x, y), zip(x[1:], y[1:])) if u != v]
    [123457]
    """
    places = sorted({round(i * end / NUM_PLACES) for i in range(NUM_PLACES + 1)})
    values = {s: f(s) for s in places}
    total = max(values.values()) - min(values.values())
    for left, right in pairwise(places):
        jump = abs(values[right] - values[left])
        if jump < 0.005 * total or total == 0:
            continue
        while right - left > 1:  # into the half that holds more of the change
            middle = (left + right) // 2
            values[middle] = f(middle)
            if abs(values[middle] - values[left]) >= abs(values[right] - values[middle]):
                right = middle
            else:
                left = middle
    kept = sorted(values)
    return [float(s) if isinstance(s, float) else s for s in kept], [values[s] for s in kept]
