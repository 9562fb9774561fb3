"""Open loop: the knob stays where it was put."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from sparsepilot.controllers.base import KNOB_FIELDS, Controller
from sparsepilot.errors import ConfigError


class Constant(Controller):
    """Holds the knob at `strength`, or at the model's own value (its k, its coefficient) when that is None.

    >>> controller = Constant()
    >>> controller.bind("k", initial=32, low=1, high=4096, total_samples=1_000_000)
    >>> controller.update(31.7, samples=4096)
    32.0
    """

    def __init__(self, strength: NonNegativeFloat | None = None) -> None:
        self._wanted = strength

    def bind(self, kind: Literal["k", "penalty"], initial: float, low: float, high: float, total_samples: int) -> None:
        self.strength = float(initial if self._wanted is None else self._wanted)
        if not low <= self.strength <= high:
            field = KNOB_FIELDS[kind] if self._wanted is None else "controller.strength"
            raise ConfigError(f"{field} = {self.strength:g}: this model's {kind} lies between {low:g} and {high:g}")

    def update(self, measured: float | None, samples: int) -> float:
        return self.strength
