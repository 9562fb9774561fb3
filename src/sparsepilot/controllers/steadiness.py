"""How much of an error is the noise of single batches, and how much a swing that the loop may keep up by itself. Pure
functions of numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

from sparsepilot.controllers.laws import average, clamp, keep_of


class Noise(NamedTuple):
    """State of `noise_step`."""

    variance: float = 0.0
    """of the errors of single steps"""
    before: float | None = None
    once_more: float | None = None
    """the last two errors"""


def noise_step(state: Noise, error: float, samples: float, lag: float) -> Noise:
    """The white noise in the errors of single steps: it has six times its variance in second differences, which a
    steady fall or a slow swing has not.

    >>> import random
    >>> noise, draw = Noise(), random.Random(0)
    >>> for n in range(400):
    ...     noise = noise_step(noise, 0.5 * math.sin(n / 40) + draw.gauss(0, 0.03), 1, lag=20)
    >>> round(math.sqrt(noise.variance), 2)
    0.03
    """
    variance, before, once_more = state
    if before is not None and once_more is not None:
        bend = (error - 2 * before + once_more) ** 2 / 6
        variance = average(variance, min(bend, OUTLIER * max(variance, LEAST)), keep_of(samples, OVER * lag))
    return Noise(variance, error, before)


def noise_after(state: Noise, keep: float) -> float:
    """Standard deviation that is left of the noise in a running average that keeps so much of itself in a step.

    >>> round(noise_after(Noise(0.04), 0.6), 6)
    0.1
    """
    return math.sqrt(state.variance * (1 - keep) / (1 + keep))


class Swing(NamedTuple):
    """State of `swing_step`."""

    mean: float = 0.0
    variance: float = 0.0


def swing_step(state: Swing, fast: float, samples: float, lag: float) -> Swing:
    """How far the fast part of the error goes to and fro.

    Args:
        state: of the step before.
        fast: the error less its average over half a lag.
        samples: since the step before.
        lag: of the loop, in samples.
    """
    mean = average(state.mean, fast, keep_of(samples, lag))
    seen = min((fast - mean) ** 2, SOFTEST * SWING**2)
    return Swing(mean, average(state.variance, seen, keep_of(samples, OVER * lag)))


def softening(swing: Swing, noise: float) -> float:
    """What the gain is divided by, so that a swing does not feed itself; `noise` is the standard deviation of what of
    the swing is only that.

    >>> softening(Swing(variance=SWING**2), 0.0), softening(Swing(variance=SWING**2), SWING)
    (2.0, 1.0)
    """
    return 1.0 + max(0.0, swing.variance - noise**2) / SWING**2


def quieting(proportional: float, noise: float, most: float) -> float:
    """What P is divided by, so that noise moves the output by no more than `most`."""
    return clamp(proportional * noise / most, 1.0, SOFTEST)


OVER = 3.0
"""Lags over which noise and swing are taken."""
SWING = 0.02
"""Rms of the error's fast part, noise taken off, at which the gain is halved: near the collapse a plant answers several
times as strongly, and sooner than its lag, and the loop alone would keep it swinging."""
SOFTEST = 10.0
"""Most that P is divided by for noise, and the gain, but for 1, for a swing: a jump is neither, and soon forgotten."""
LEAST, OUTLIER = 0.01**2, 9.0
"""Variance of noise that always counts as ordinary; how many times the usual one a single deviation counts at most."""
