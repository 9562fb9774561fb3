"""The laws themselves: pure functions of numbers."""

from __future__ import annotations

import math
from typing import NamedTuple


def keep_of(samples: float, over: float) -> float:
    """What a running average over `over` samples keeps of itself while `samples` pass.

    >>> round(keep_of(100, 100), 3), keep_of(100, 0)
    (0.368, 0.0)
    """
    return math.exp(-samples / over) if over > 0 else 0.0


def average(before: float | None, value: float, keep: float) -> float:
    """A running average that begins with its first value, so that it has no bias towards a start.

    >>> average(None, 5.0, 0.9), average(5.0, 6.0, 0.9)
    (5.0, 5.1)
    """
    return value if before is None else keep * before + (1 - keep) * value


class Gains(NamedTuple):
    """Of `pi_step`. Positive errors raise the output."""

    proportional: float
    """output per unit of error"""
    integral_samples: float
    """samples after which a constant error has added as much again as the proportional part"""
    largest_error: float
    """errors count up to this size"""
    rate: float
    """most that the output moves per sample"""
    low: float
    high: float


class PI(NamedTuple):
    """State and outcome of a control step."""

    output: float
    integral: float
    proportional: float
    at_limit: bool


def pi_step(state: PI, error: float, samples: float, gains: Gains, hold: bool = False) -> PI:
    """One step of a proportional-integral law with clamps, a rate limit and an integral that does not wind up.

    The integral stands still where `hold` says so, and where the output is at a limit that the error presses against.

    Args:
        state: of the step before.
        error: what is to become 0.
        samples: since the step before.
        gains: see there.
        hold: what is steered cannot move any faster.

    >>> gains = Gains(2.0, integral_samples=100, largest_error=1.0, rate=1.0, low=-5, high=5)
    >>> start = PI(0.0, 0.0, 0.0, False)
    >>> pi_step(start, 0.1, 10, gains)
    PI(output=0.22, integral=0.02, proportional=0.2, at_limit=False)
    >>> pi_step(start, 9.0, 1, gains)                 # the error counts as 1, the rate limit allows 1
    PI(output=1.0, integral=0.0, proportional=2.0, at_limit=True)
    """
    error = min(gains.largest_error, max(-gains.largest_error, error))
    proportional = gains.proportional * error
    integral = state.integral if hold else state.integral + proportional * samples / gains.integral_samples
    wanted = proportional + integral
    step = gains.rate * samples
    output = min(gains.high, max(gains.low, min(state.output + step, max(state.output - step, wanted))))
    if (wanted - output) * error > 0:
        integral = state.integral
    return PI(output, min(gains.high, max(gains.low, integral)), proportional, hold or output != wanted)
