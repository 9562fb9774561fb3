"""What the inner loop has in its hand: a penalty's strength (penalty_knob.py) or a k (k_knob.py)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from sparsepilot.controllers.base import KNOB_FIELDS, Measured, Plant
from sparsepilot.controllers.state import as_lists, as_tuples
from sparsepilot.errors import ConfigError

FEWEST = 1e-3
"""L0 that stands for none at all, where its logarithm is needed."""


def log_l0(l0: float, over: float = 1.0) -> float:
    """ln(L0 / over), of no latent at all, too.

    >>> round(log_l0(0.0), 2), round(log_l0(20.0, over=10.0), 2)
    (-6.91, 0.69)
    """
    return math.log(max(l0, FEWEST) / over)


def lowest_l0(plant: Plant) -> float:
    """The least L0 that may be asked of what is steered."""
    return plant.low if plant.kind == "k" else FEWEST


class Seen(NamedTuple):
    """What the loop has made of the last measurement."""

    measured: Measured
    was: float
    """the set point that has held for it"""
    now: float
    """the set point from here on"""
    planned: float
    """nats by which it has moved since, where that was given beforehand"""
    mean_l0: float
    """of training, smoothed"""
    mean_set_point: float
    """smoothed alike"""
    error: float
    """ln(L0 / L0*) of held-out rows, from the two"""
    ratio: float
    """L0 of held-out rows over that of training"""


class Knob(ABC):
    """One kind of knob.

    Args:
        plant: whose knob it is.
        strength: its value at first.
        low, high: the range of it.
        field: where that value comes from.

    Raises ConfigError where the knob cannot start there.
    """

    ratio_weight: ClassVar[float]
    """Of the last validation in the ratio of held-out rows to training."""
    state: ClassVar[tuple[str, ...]]
    """Names of the attributes that a resumed run needs: numbers and tuples of them."""

    def __init__(self, plant: Plant, strength: float, low: float, high: float, field: str | None = None) -> None:
        if not low <= strength <= high:
            raise ConfigError(
                f"{field or KNOB_FIELDS[plant.kind]} = {strength:g}: should lie between {low:g} and {high:g}"
            )
        self.plant, self.strength, self.low, self.high = plant, strength, low, high

    @abstractmethod
    def turn(self, seen: Seen) -> bool:
        """One control step; whether something has been found to have happened to the plant in it."""

    @abstractmethod
    def believes(self, log_ratio: float, before: float, error: float) -> bool:
        """Whether a validation tells the ratio of held-out rows to training.

        Args:
            log_ratio: ln of the ratio that it has.
            before: the one that was known.
            error: of training's L0 at that moment, in nats.
        """

    @abstractmethod
    def disturb(self, factor: float) -> None:
        """Multiplies it, from outside."""

    @abstractmethod
    def readings(self) -> dict[str, float]:
        """What is logged of it under `controller/`, beside its strength."""

    def state_dict(self) -> dict[str, Any]:
        return {name: as_lists(getattr(self, name)) for name in self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state:
            setattr(self, name, as_tuples(state[name]))
