"""The contract of a sparsity controller: a measurement in, a knob value out, once per optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from sparsepilot.errors import ConfigError

KNOB_FIELDS = {"k": "model.k", "penalty": "model.coefficient"}
"""Where a knob's own value stands in the configuration."""


class Plant(NamedTuple):
    """What a controller is to steer."""

    kind: Literal["k", "penalty"]
    """what its knob is: latents per row, or the coefficient of a penalty"""
    initial: float
    """the knob's value in the configuration"""
    low: float
    high: float
    d_sae: int
    batch: int
    """samples between two control actions"""
    total_samples: int
    integrates: bool = False
    """whether L0 goes on moving for as long as the penalty is off its balance, instead of following it after a lag"""
    slew: Callable[[int], float] | None = None
    """clock -> how fast ln L0 can fall there at most, in nats per sample; None: no limit is known"""
    steered_by: str | None = None
    """what of the model's own steers L0 already, where something does"""
    whole: bool = False
    """whether a k is rounded to a whole number"""


def refuse_part_of_a_latent(field: str, l0: float, plant: Plant) -> None:
    """Refuses an L0 that is no whole number where each row has as many latents.

    Raises:
        ConfigError: naming `field` and the whole numbers beside it.
    """
    if plant.whole and l0 != round(l0):
        raise ConfigError(
            f"{field}: an L0 of {l0:g} is wanted; this model has a whole number of latents in each row: "
            f"{math.floor(l0)} or {math.ceil(l0)}, or model=batchtopk, whose rows have {l0:g} on average"
        )


class Measured(NamedTuple):
    """One optimizer step, over the global batch."""

    l0: float
    fvu: float = math.nan
    coherence: float = 0.0
    """sum of the thresholds' motion over the sum of its sizes: at 1 they all rise as fast as they can, at -1 fall"""

    @property
    def tells(self) -> bool:
        """Whether a law may act on it: a NaN would stay in its averages for good."""
        return math.isfinite(self.l0)


class Controller(ABC):
    """Turns the knob of one autoencoder.

    A controller is told the previous step's measurement, averaged over the global batch, so every rank computes the
    same action. Its state is plain numbers, saved with the run.
    """

    strength: float
    """The knob's present value: a penalty coefficient, or latents per row."""

    @abstractmethod
    def bind(self, plant: Plant) -> None:
        """Called once before training.

        Raises ConfigError when the controller's settings do not fit what it is to steer."""

    @abstractmethod
    def update(self, measured: Measured | None, samples: int) -> float:
        """One control step.

        Args:
            measured: the previous optimizer step over the global batch, or None when there is none yet.
            samples: the clock, after the step just taken.

        Returns:
            The knob value for the next step, also in `strength`.
        """

    def planned(self, samples: int, total_samples: int) -> float | None:
        """What is planned in shares of the budget, at the clock `samples` of a budget: a set point, or the knob itself.
        None where nothing is."""
        return None

    def notes(self) -> list[str]:
        """What a user should know of these settings before training; called after `bind`."""
        return []

    def observe(self, row: Mapping[str, object], samples: int) -> dict[str, float]:
        """A row of held-out figures (`val/l0`, `val/fvu`, `val/ce`, ...); returns what it adds to that row."""
        return {}

    def wants_validation(self, samples: int) -> bool:
        """Whether a validation is needed now, after the step that ended at `samples`, apart from the regular ones."""
        return False

    def disturb(self, factor: float) -> None:
        """Multiplies the strength, from outside; for seeing what the law makes of it."""
        self.strength *= factor

    def readings(self) -> dict[str, float]:
        """What is logged under `controller/`: always `strength`; in closed loop

        target     L0 that is aimed at, as a validation would measure it
        measured   L0 as the controller sees it, smoothed, in the same terms
        error      ln(measured / target)
        at_limit   1 where a clamp, the rate limit or the plant's own slew limit holds the knob, else 0
        """
        return {"strength": self.strength}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: numbers, None, and lists and dicts of them."""
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.strength = state["strength"]
