"""Set points over a run: breakpoints (share of the budget, L0) joined log-linearly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sparsepilot.controllers.base import Plant
from sparsepilot.errors import ConfigError

REFERENCE = ((0.0, 8000.0), (0.125, 200.0), (0.25, 80.0), (0.375, 40.0), (0.5, 20.0), (1.0, 4.0))
"""L0 of the reference run (200M samples) by share of its budget."""

EASE = 2.0
"""Power of the share of the way that is left: 1 would be a straight line into a corner, where a plant that needs more
strength to fall than to stay is left with too much of it."""

Breakpoints = Sequence[Sequence[float]]


def set_point(breakpoints: Breakpoints, done: float) -> float:
    """L0 at the share `done` of the budget, constant before the first breakpoint and after the last.

    >>> [round(set_point(REFERENCE, done)) for done in (0, 0.0625, 0.125, 0.75, 1)]
    [8000, 1265, 200, 9, 4]
    """
    if done <= breakpoints[0][0]:
        return breakpoints[0][1]
    for (start, l0_start), (end, l0_end) in pairwise(breakpoints):
        if done < end:
            return float(l0_start * (l0_end / l0_start) ** ((done - start) / (end - start)))
    return breakpoints[-1][1]


def glide(before: float, l0: float, target: float, samples: float, left: float, followed: float) -> float:
    """The set point `samples` later, on the way to a target that is due when `left` samples have passed.

    ln L0 comes in along a parabola, ever more slowly; where L0 is already lower, early in training and by itself, it
    goes down with it, by at most `followed` nats per sample, instead of holding L0 up. It never rises, and never goes
    below the target.

    >>> round(glide(100, 100, 25, samples=1, left=4, followed=0.1))
    50
    >>> round(glide(100, 40, 25, samples=1, left=1000, followed=0.1), 1), glide(100, 5, 25, 1, 1000, followed=10)
    (90.5, 25.0)
    """
    if before <= target or left <= samples:
        return float(target)
    line = before * math.exp(math.log(target / before) * min(1.0, EASE * samples / left))
    return max(float(target), min(line, max(l0, before * math.exp(-followed * samples))))


def check_breakpoints(field: str, breakpoints: Breakpoints, lowest: float, d_sae: int) -> None:
    """Refuses breakpoints that no run could follow.

    Raises:
        ConfigError: naming `field`, the breakpoint and what would be right.
    """
    shown = [list(point) for point in breakpoints]
    if not shown or any(len(point) != 2 for point in shown):
        raise ConfigError(f"{field} = {shown}: pairs [share of the budget, L0] are needed")
    shares = [point[0] for point in breakpoints]
    if sorted(set(shares)) != shares or shares[0] < 0 or shares[-1] > 1:
        raise ConfigError(f"{field} = {shown}: shares of the budget must ascend within 0 to 1")
    for share, l0 in breakpoints:
        if not lowest <= l0 <= d_sae:
            raise ConfigError(
                f"{field}: L0 {l0:g} at {share:g} of the budget; this model can have {lowest:g} to {d_sae:,}"
            )


SLEW_POINTS = 16
"""Places of a fall whose learning rates make the limit of all of it."""


def steepest(plant: Plant, start: float, end: float) -> float:
    """Nats per sample by which ln L0 can fall at most, in the mean between two shares of the budget; infinite where no
    limit is known, and for a k, which is set."""
    if plant.slew is None or plant.kind == "k":
        return math.inf
    places = (start + (end - start) * (i + 0.5) / SLEW_POINTS for i in range(SLEW_POINTS))
    return sum(plant.slew(int(place * plant.total_samples)) for place in places) / SLEW_POINTS


def refuse_too_steep(field: str, breakpoints: Breakpoints, plant: Plant) -> None:
    """Refuses a fall of L0 that a penalty's plant cannot follow, however strong the penalty is: between any two
    breakpoints, with the mean learning rate that there is between them.

    Raises:
        ConfigError: naming `field`, the fall, the limit and what would be right.
    """
    for (start, l0_start), (end, l0_end) in pairwise(breakpoints):
        fall = math.log(l0_start / l0_end) / ((end - start) * plant.total_samples)
        limit = steepest(plant, start, end)
        if fall <= limit:
            continue
        raise ConfigError(
            f"{field}: L0 is to fall by {fall * plant.batch:.2g} nats per step between {start:g} and {end:g} of the "
            f"budget; with this learning rate it can fall by at most {limit * plant.batch:.2g} per step, whatever the "
            f"batch: give more samples, a smaller batch than {plant.batch}, a higher learning rate or a flatter fall"
        )
