"""How L0 and its error move: what a law wants to know beside where they are. Pure functions of numbers."""

from __future__ import annotations

from typing import NamedTuple

from sparsepilot.controllers.laws import average, keep_of

SLOPE_OVER = 0.5
"""In lags: the average that the error and L0 are compared with for their slope."""
CREEP = 0.005
"""Nats in a lag by which L0 itself follows where thresholds run at their limit. (Not the error: where the set point
moves as fast as L0, or faster, that does not shrink, at the limit or not.)"""
SHRINKS = 0.02
"""Nats in a lag by which the error has to shrink for the same of a wide kernel, whose weights press on L0 as well and
may undo what thresholds do. L0 falls for other reasons, too."""
FALLING, COLLAPSING = 0.1, -0.7
"""Nats in a lag from which on L0 counts as falling, and the error, as it will be in a lag, at which latents are being
lost."""


class Motion(NamedTuple):
    """State of `motion_step`, and what it has found."""

    slow_error: float | None = None
    slow_l0: float | None = None
    error_in_a_lag: float = 0.0
    """ln(L0 / L0*) as it will be in a lag at its present pace"""
    falls: float = 0.0
    """nats by which L0 itself falls in a lag; below 0 where it rises"""


def motion_step(state: Motion, error: float, log_l0: float, samples: float, lag: float) -> Motion:
    """The pace of the error and of L0, each from what it is beside its own average.

    Args:
        state: of the step before.
        error: ln(L0 / L0*).
        log_l0: ln L0.
        samples: since the step before.
        lag: of the loop, in samples.

    >>> motion = Motion()
    >>> for n in range(100):  # L0 stands still, its set point rises by 0.2 nats in a lag
    ...     motion = motion_step(motion, -0.01 * n, 3.0, 1, lag=20)
    >>> round(motion.error_in_a_lag + 0.99, 2), motion.falls
    (-0.19, 0.0)
    """
    keep = keep_of(samples, SLOPE_OVER * lag)
    slow_error, slow_l0 = average(state.slow_error, error, keep), average(state.slow_l0, log_l0, keep)
    in_a_lag = error + (error - slow_error) / SLOPE_OVER
    return Motion(slow_error, slow_l0, in_a_lag, (slow_l0 - log_l0) / SLOPE_OVER)


def collapses(motion: Motion, error: float) -> bool:
    """Whether L0 is on its way to far below its set point. A set point that rises past it is none of that.

    >>> collapses(Motion(error_in_a_lag=-0.9, falls=0.5), error=-0.4)
    True
    >>> collapses(Motion(error_in_a_lag=-0.9, falls=0.0), error=-0.4)
    False
    """
    return motion.error_in_a_lag < COLLAPSING and motion.error_in_a_lag < error - FALLING and motion.falls > FALLING


def follows(motion: Motion, error: float, *, integrates: bool) -> bool:
    """Whether L0 goes where the error asks it to, so that thresholds which all move that way move it.

    Args:
        motion: of this step.
        error: ln(L0 / L0*).
        integrates: whether thresholds alone move L0 (a narrow kernel).
    """
    if integrates:
        return (motion.falls if error >= 0 else -motion.falls) > CREEP
    return abs(error) - abs(motion.error_in_a_lag) > SHRINKS
