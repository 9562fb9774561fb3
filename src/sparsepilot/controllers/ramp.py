"""Open loop: the knob goes from one value to another over a part of the run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from sparsepilot.controllers.base import KNOB_FIELDS, Controller
from sparsepilot.errors import ConfigError


class Ramp(Controller):
    """From `start` to `end`, linearly, over the share of the budget from `begin` to `until`; constant before and after.

    What papers do to let a dictionary form before the penalty presses.

    Args:
        start: the knob's value at first.
        end: its value from `until` on; None: the model's own.
        begin: share of the budget after which it moves.
        until: share of the budget at which it has arrived.

    >>> ramp = Ramp(until=0.5)
    >>> ramp.bind("penalty", initial=4.0, low=0, high=1e8, total_samples=1000)
    >>> [ramp.update(None, samples) for samples in (0, 250, 500, 1000)]
    [0.0, 2.0, 4.0, 4.0]
    """

    def __init__(
        self,
        start: NonNegativeFloat = 0.0,
        end: NonNegativeFloat | None = None,
        begin: Annotated[float, Field(ge=0, le=1)] = 0.0,
        until: Annotated[float, Field(gt=0, le=1)] = 0.25,
    ) -> None:
        if begin >= until:
            raise ConfigError(f"controller.begin = {begin}: must lie before controller.until = {until}")
        self.start, self._wanted, self.begin, self.until = start, end, begin, until

    def bind(self, kind: Literal["k", "penalty"], initial: float, low: float, high: float, total_samples: int) -> None:
        self.total_samples = total_samples
        self.end = float(initial if self._wanted is None else self._wanted)
        self.low, self.high = low, high
        if not low <= self.end <= high:
            field = KNOB_FIELDS[kind] if self._wanted is None else "controller.end"
            raise ConfigError(f"{field} = {self.end:g}: this model's {kind} lies between {low:g} and {high:g}")
        if self.start > high:
            raise ConfigError(f"controller.start = {self.start:g}: this model's {kind} is at most {high:g}")
        self.strength = self._at(0)

    def update(self, measured: float | None, samples: int) -> float:
        self.strength = self._at(samples)
        return self.strength

    def _at(self, samples: int) -> float:
        done = (samples / self.total_samples - self.begin) / (self.until - self.begin)
        value = self.start + (self.end - self.start) * min(1.0, max(0.0, done))
        return float(min(self.high, max(self.low, value)))
