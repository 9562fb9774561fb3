"""The outer law of `constrained`: where the quality wants L0 to go. A pure function of numbers."""

from __future__ import annotations

from typing import NamedTuple

from sparsepilot.controllers.laws import GainEstimate, clamp, estimate_gain


class Seek(NamedTuple):
    """State of `seek_step`."""

    drift: float = 0.0
    """nats per sample by which the L0 that the target allows moves"""
    response: GainEstimate = GainEstimate()
    """of the quality to L0, in units of LEAST_RESPONSE"""


class SeekGains(NamedTuple):
    """Of `seek_step`."""

    respond_samples: float
    """samples in which the set point goes all but 1/e of the way to the L0 that the target allows"""
    climb: float
    """most that ln L0* falls by per sample"""
    recover: float
    """most that it rises by"""
    lag: float
    """samples that the inner loop takes to answer"""


def seek_step(
    state: Seek, set_point: float, answer: float, violation: float, samples: float, gains: SeekGains
) -> tuple[Seek, float]:
    """How far ln L0* moves at a measurement of the quality, and the state after it.

        a = ln L0 + v / b                                the L0 that the target allows, as far as can be told from here
        d ln L0* / dn = (a - ln L0*) / respond_samples + D
        dD / dn = v / b / (LEARN * respond_samples^2)

    between -climb and recover. b, by how much ln(excess) falls per nat of L0, is learned from what both have lately
    done together. As a is reckoned from the L0 that there is, the time that L0 takes to follow its set point does not
    make the loop swing. D learns how fast a moves along with training, which a law without it would follow at a
    distance, as it does what L0 lacks to its set point. It stands still far from a, at a limit of the speed, and where
    L0 does not follow its set point, and is never so large that it alone would keep the set point far from a.

    Args:
        state: of the measurement before.
        set_point: ln L0*.
        answer: ln L0, as it was when the quality was measured.
        violation: v, ln(excess / allowed excess); it counts from -1 to 1.
        samples: since the measurement before.
        gains: see there.

    >>> gains, state, at = SeekGains(400, climb=0.003, recover=0.012, lag=20), Seek(), 6.0
    >>> for n in range(0, 20_000, 10):
    ...     allowed = 4.0 - 1e-4 * n                              # training makes a lower L0 good enough
    ...     state, move = seek_step(state, at, at, 0.5 * (allowed - at), 10, gains)
    ...     at += move
    >>> abs(at - allowed) < 0.01, round(1e4 * state.drift, 1)
    (True, -1.0)
    """
    near = clamp(violation, -NEAR, NEAR)  # far from the target the power is another one
    # seldom measured, the averages are to reach over some measurements
    response = estimate_gain(state.response, answer, near / LEAST_RESPONSE, samples, max(gains.lag, samples))
    lacking = clamp(violation, -1.0, 1.0) / (LEAST_RESPONSE * response.gain)
    away = answer + lacking - set_point
    wanted = away * samples / gains.respond_samples + state.drift * samples
    move = clamp(wanted, -gains.climb * samples, gains.recover * samples)
    drift = state.drift
    if abs(away) <= LEARNS and abs(answer - set_point) <= FOLLOWS and move == wanted:
        drift += lacking * samples / (LEARN * gains.respond_samples**2)
    largest = DRIFTS * LEARNS / gains.respond_samples
    return Seek(clamp(drift, -min(gains.climb, largest), min(gains.recover, largest)), response), move


LEAST_RESPONSE = 0.3
"""Least nats by which the excess is taken to fall per nat of L0."""
NEAR = 0.5
"""Largest violation from whose movements that is learned."""
LEARNS, LEARN = 0.5, 2.0
"""Nats from which on the drift is learned, and the times of `respond_samples` that it takes, damped by 0.7."""
FOLLOWS = 0.25
"""Nats that L0 may be away from its set point while the drift is learned: what it lacks is not the drift's."""
DRIFTS = 0.5
"""Share of LEARNS that the drift may keep the set point away from the L0 that the target allows."""
