"""A k: set to the set point, and what is then beside it taken back."""

from __future__ import annotations

import math

from sparsepilot.controllers.base import Plant
from sparsepilot.controllers.knob import Knob, Seen, log_l0
from sparsepilot.controllers.laws import clamp

LAGS, FROM = 0.5, 0.005
"""Lags in which all but 1/e of what training's L0 is beside the k that was asked for is taken back, and the difference
in nats from which on it counts: less is rounding."""
STEADY, DOUBTED = 0.05, 0.15
"""Where the ratio of held-out rows to training has stood still within so many nats, a validation that is suddenly so
many away has met an upset, and the next one decides."""


def trim_step(trim: float, off: float, unused: float, samples: float, lag: float) -> float:
    """What ln k is moved by so that training has the L0 that was asked for: nothing, unless somebody disturbs the k.

    Args:
        trim: of the step before.
        off: ln(L0 / k that was asked for).
        unused: ln(L0 / k in use). Where fewer latents fire than k allows, more of it would change nothing.
        samples: since the step before.
        lag: of the loop, in samples.

    >>> [round(trim_step(0.0, off, unused, 1, lag=20), 6) for off, unused in ((0.7, 0.0), (-0.7, -0.7), (0.003, 0.0))]
    [-0.07, 0.0, 0.0]
    """
    fewer_fire = off < 0 and unused < -FROM
    return trim if abs(off) <= FROM or fewer_fire else trim - off * samples / (LAGS * lag)


class KKnob(Knob):
    """Latents per row, fractional where that is an average.

    What training has is k exactly; where it is not, somebody has disturbed the k in use, and `trim_step` takes that
    back. Held-out rows may have another L0 (BatchTopK's threshold): the k that is asked for is L0* over their ratio.
    """

    # the ratio moves, as the threshold settles, and is hardly noisy
    ratio_weight = 0.5
    state = ("strength", "_outside", "_trim", "_asked_ks", "_used_ks", "_steady")

    def __init__(self, plant: Plant, set_point: float, lag: float) -> None:
        super().__init__(plant, set_point, plant.low, plant.high)
        self._lag = lag
        self._outside, self._trim = 0.0, 0.0
        # a measured L0 is that of the last step or of the one before
        self._asked_ks, self._used_ks = (set_point, set_point), (set_point, set_point)
        self._steady = False

    def turn(self, seen: Seen) -> bool:
        off, unused = (
            min((log_l0(seen.measured.l0, over=k) for k in ks), key=abs) for ks in (self._asked_ks, self._used_ks)
        )
        self._trim = trim_step(self._trim, off, unused, self.plant.batch, self._lag)
        wanted = clamp(seen.now / seen.ratio, self.low, self.high)
        self.strength = clamp(wanted * math.exp(self._trim + self._outside), self.low, self.high)
        self._asked_ks = (self._in_rows(wanted), self._asked_ks[0])
        self._used_ks = (self._in_rows(self.strength), self._used_ks[0])
        return False

    def _in_rows(self, k: float) -> float:
        """What a model makes of a k."""
        return max(1.0, round(k)) if self.plant.whole else k

    def believes(self, log_ratio: float, before: float, error: float) -> bool:
        jump, was_steady = abs(log_ratio - before), self._steady
        self._steady = jump < STEADY
        return not was_steady or jump <= DOUBTED

    def disturb(self, factor: float) -> None:
        """Multiplies the k in use, for good, of which the loop knows nothing but the L0 that comes of it."""
        self._outside += math.log(factor)
        self.strength = clamp(self.strength * factor, self.low, self.high)

    def readings(self) -> dict[str, float]:
        return {"at_limit": float(self.strength in (self.low, self.high))}
