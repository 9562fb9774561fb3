"""Open loop: the knob stays where it was put."""

from __future__ import annotations

from pydantic import NonNegativeFloat

from sparsepilot.controllers.base import KNOB_FIELDS, Controller, Measured, Plant, refuse_part_of_a_latent
from sparsepilot.errors import ConfigError


class Constant(Controller):
    """Holds the knob at `strength`, or at the model's own value (its k, its coefficient) when that is None.

    >>> controller = Constant()
    >>> controller.bind(Plant("k", initial=32, low=1, high=4096, d_sae=4096, batch=4096, total_samples=1_000_000))
    >>> controller.update(Measured(31.7), samples=4096)
    32.0
    """

    def __init__(self, strength: NonNegativeFloat | None = None) -> None:
        self._wanted = strength

    def bind(self, plant: Plant) -> None:
        self.strength = float(plant.initial if self._wanted is None else self._wanted)
        refuse_part_of_a_latent("controller.strength", self.strength, plant)
        if not plant.low <= self.strength <= plant.high:
            field = KNOB_FIELDS[plant.kind] if self._wanted is None else "controller.strength"
            raise ConfigError(
                f"{field} = {self.strength:g}: this model's {plant.kind} lies between {plant.low:g} and {plant.high:g}"
            )

    def update(self, measured: Measured | None, samples: int) -> float:
        return self.strength
