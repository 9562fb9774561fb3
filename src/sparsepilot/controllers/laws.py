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

    >>> average(None, 5.0, 0.9), round(average(5.0, 6.0, 0.9), 6)
    (5.0, 5.1)
    """
    return value if before is None else keep * before + (1 - keep) * value


def clamp(value: float, low: float, high: float) -> float:
    """`value`, or the bound that it lies beyond."""
    return float(min(high, max(low, value)))


class Gains(NamedTuple):
    """Of `pi_step`. Positive errors raise the output; times are in samples."""

    proportional: float
    """output per unit of error"""
    integral_samples: float
    """samples after which a constant error has added as much again as the proportional part"""
    drift_samples: float
    """samples after which a constant error has made the integral move by itself as fast as the error moves it"""
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
    drift: float = 0.0
    """what the integral moves by per sample without an error"""
    proportional: float = 0.0
    at_limit: bool = False


def pi_step(state: PI, error: float, samples: float, gains: Gains, hold: bool = False) -> PI:
    """One step of a proportional-integral law with clamps, a rate limit and integrals that do not wind up.

        u = P + I,  P = proportional * e,  dI/dn = P / integral_samples + R,
        dR/dn = P / (integral_samples * drift_samples)

    R learns how fast the right output moves along with training, which a law without it would follow with an error.
    I and R stand still where `hold` says so, and where the output is at a limit that the error presses against.

    Args:
        state: of the step before.
        error: what is to become 0.
        samples: since the step before.
        gains: see there.
        hold: an integral would wind up now.

    >>> gains = Gains(2.0, 100, drift_samples=1000, largest_error=1.0, rate=1.0, low=-5, high=5)
    >>> step = pi_step(PI(0.0, 0.0), 0.1, 10, gains)
    >>> round(step.output, 6), round(step.integral, 6), round(step.drift, 6), step.at_limit
    (0.22, 0.02, 2e-05, False)
    >>> pi_step(PI(0.0, 0.0), 9.0, 1, gains)                 # the error counts as 1, the rate limit allows 1
    PI(output=1.0, integral=0.0, drift=0.0, proportional=2.0, at_limit=True)
    """
    proportional = gains.proportional * clamp(error, -gains.largest_error, gains.largest_error)
    pressed = 0.0 if hold else proportional * samples / gains.integral_samples
    integral = state.integral + pressed + (0.0 if hold else state.drift * samples)
    learns = abs(error) <= SMALL  # on the way from afar the output moves for another reason than drift
    drift = state.drift + (pressed / gains.drift_samples if learns else 0.0)
    wanted = proportional + integral
    reach = gains.rate * samples
    output = clamp(clamp(wanted, state.output - reach, state.output + reach), gains.low, gains.high)
    if (wanted - output) * error > 0:
        integral, drift = state.integral, state.drift
    return PI(output, clamp(integral, gains.low, gains.high), drift, proportional, output != wanted)


SMALL = 0.25
"""Largest error from which `pi_step` learns the drift."""


class GainEstimate(NamedTuple):
    """How much ln L0 falls per nat of ln(strength), learned from what both have lately done together.

    Both are compared with their running averages, twice, so that neither a level nor a steady drift counts as an answer
    of the plant. The estimate begins at 1 and changes only where the output moves.
    """

    gain: float = 1.0
    output: float | None = None
    """ln(strength) as the plant has felt it: behind by a lag"""
    means: tuple[float, float, float, float] | None = None
    """running averages of output and answer, and of their distances from those"""
    covariance: float = 0.0
    variance: float = 0.0


def estimate_gain(state: GainEstimate, output: float, answer: float, samples: float, lag: float) -> GainEstimate:
    """One step of the estimate.

    Args:
        state: of the step before.
        output: ln(strength).
        answer: ln L0.
        samples: since the step before.
        lag: samples that the plant takes to answer.

    >>> state, answer = GainEstimate(), 0.0
    >>> for n in range(4000):
    ...     output = math.sin(n / 30)
    ...     answer += (-3 * output - answer) / 15                  # a plant of gain 3
    ...     state = estimate_gain(state, output, answer, 1, lag=20)
    >>> 2.5 < state.gain < 3.5
    True
    """
    felt = average(state.output, output, keep_of(samples, FELT_AFTER * lag))
    keep = keep_of(samples, OVER * lag)
    if state.means is None:
        return state._replace(output=felt, means=(felt, answer, 0.0, 0.0))
    mean_u, mean_y = average(state.means[0], felt, keep), average(state.means[1], answer, keep)
    mean_du, mean_dy = average(state.means[2], felt - mean_u, keep), average(state.means[3], answer - mean_y, keep)
    du, dy = felt - mean_u - mean_du, answer - mean_y - mean_dy
    if abs(dy) > JUMP:
        return GainEstimate()
    forget = (1 - keep) * du * du / (du * du + DOUBT)  # where nothing moves there is nothing to learn, and to forget
    covariance = average(state.covariance, du * dy, 1 - forget)
    variance = average(state.variance, du * du, 1 - forget)
    gain = (DOUBT - covariance) / (DOUBT + variance)
    return GainEstimate(clamp(gain, *GAIN_RANGE), felt, (mean_u, mean_y, mean_du, mean_dy), covariance, variance)


FELT_AFTER, OVER = 0.75, 5.0
"""In lags: what the plant feels of the output, and what the estimate averages over."""
JUMP = 5.0
"""Nats that no strength moves L0 by in that time: a measurement gone wrong, of which nothing is to be remembered."""
DOUBT = 0.05**2
"""Variance of ln(strength) that counts as no movement."""
GAIN_RANGE = (1.0, 20.0)
