"""What the inner loop does when something has happened to a run that was calm. Pure functions of numbers."""

from __future__ import annotations

import math
from typing import NamedTuple


class Calm(NamedTuple):
    """What the output was while the loop kept to a set point that stood still, so that it can go back there."""

    set_point: float = math.inf
    """ln of the set point when it became calm"""
    samples: float = 0.0
    """of the span that is being averaged"""
    total: float = 0.0
    """of output times samples in it"""
    pending: float | None = None
    """the mean over the span before: it counts once the loop has stayed calm for a span more"""
    output: float | None = None
    """the last mean that counted"""


def calm_step(state: Calm, set_point: float, error: float, output: float, samples: float, span: float) -> Calm:
    """One step of that memory. What disturbs the loop shows in the error later than in the output, which is why a
    span's mean counts only once the next span is over, too. Of another set point nothing is known.

    >>> state = Calm()
    >>> for n in range(100):
    ...     state = calm_step(state, 3.5, 0.01, 3.0, 1, span=20)
    >>> for n in range(15):                                        # the output jumps, the error follows after 5 steps
    ...     state = calm_step(state, 3.5, 0.01 if n < 5 else -0.9, 7.0, 1, span=20)
    >>> state.output
    3.0
    >>> calm_step(state, 3.0, 0.5, 7.0, 1, span=20).output is None
    True
    """
    if abs(set_point - state.set_point) > CALM:
        state = Calm(set_point)
    if abs(error) >= CALM:
        return Calm(state.set_point, output=state.output)
    since, total = state.samples + samples, state.total + output * samples
    if since < span:
        return state._replace(samples=since, total=total)
    return Calm(state.set_point, 0.0, 0.0, total / since, state.output if state.pending is None else state.pending)


CALM = 0.1
"""Largest error that counts as keeping to the set point, and the most that this may have moved."""


class Upset(NamedTuple):
    """State of `upset_step`."""

    calm: Calm = Calm()
    side: float = 0.0
    """sign of the error while L0 is being brought back, else 0"""
    mark: float = 0.0
    """size of the error when it was last seen to shrink"""
    left: float = 0.0
    """samples for which the integral stays where it is"""


def upset_step(
    state: Upset,
    set_point: float,
    error: float,
    slow: float,
    output: float,
    samples: float,
    lag: float,
    integrates: bool = False,
) -> tuple[Upset, float | None]:
    """Whether something has happened, and whether it is over: a learning rate that jumped, other data, thresholds that
    were moved, a strength that somebody changed.

    The plant is mostly still the one that it was. So the integral goes back, once, to what held while it was calm, and
    stays there while L0 comes back. Where that has come no nearer for PATIENCE lags the plant is another one, or one of
    thresholds, which may just be slow: the integral goes on from where it is, beside what brings L0 back. When L0 is
    back the integral stays for AFTERWARDS lags more, as L0 still moves from having been brought there.

    Args:
        state: of the step before.
        set_point: ln of it.
        error: ln(L0 / L0*).
        slow: the same, averaged over half a lag or so.
        output: ln(strength).
        samples: since the step before.
        lag: of the loop, in samples.
        integrates: as `Plant.integrates`.

    Returns:
        The state, and what the integral is to be from this step on, if something else than it was.

    >>> state = Upset()
    >>> for n in range(60):
    ...     state, integral = upset_step(state, 3.5, 0.0, 0.0, -1.0, 1, lag=20)
    >>> state, integral = upset_step(state, 3.5, -0.5, -0.3, -1.0, 1, lag=20)
    >>> integral, state.side, state.left                               # something has happened: back to -1
    (-1.0, -1.0, 80.0)
    >>> back, integral = upset_step(state, 3.5, 0.1, -0.1, -3.0, 1, lag=20)
    >>> integral, back.side, back.left                                 # L0 is back
    (None, 0.0, 40.0)
    >>> for n in range(80):
    ...     state, integral = upset_step(state, 3.5, -0.5, -0.5, -3.0, 1, lag=20)
    >>> integral, state.side, state.left                               # it does not come back: the integral goes on
    (None, -1.0, 0.0)
    """
    calm, (_, side, mark, left) = calm_step(state.calm, set_point, slow, output, samples, lag), state
    if abs(slow) > UPSET and calm.output is not None:
        return Upset(Calm(), math.copysign(1.0, slow), abs(slow), PATIENCE[integrates] * lag), calm.output
    if not side:
        return Upset(calm, left=max(0.0, left - samples)), None
    if side * error < 0 or abs(slow) < BACK:
        return Upset(calm, left=AFTERWARDS * lag), None
    if abs(slow) < NEARER * mark:
        return Upset(calm, side, abs(slow), PATIENCE[integrates] * lag), None
    return Upset(calm, side, mark, max(0.0, left - samples)), None


UPSET, NEARER, BACK = 0.2, 0.7, 0.05
"""Error after a calm time from which on something has happened, what is left of it when it has come nearer, and the
size of one at which L0 is back."""
PATIENCE, AFTERWARDS = {False: 4.0, True: 12.0}, 2.0
"""In lags; patience with a plant that follows, and with one that integrates."""
