"""The contract of a sparsity controller: a measurement in, a knob value out, once per optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

KNOB_FIELDS = {"k": "model.k", "penalty": "model.coefficient"}
"""Where a knob's own value stands in the configuration."""


class Controller(ABC):
    """Turns the knob of one autoencoder.

    A controller is told the previous step's L0, averaged over the global batch, so every rank computes the same action.
    Its state is plain numbers, saved with the run.
    """

    strength: float
    """The knob's present value: a penalty coefficient, or latents per row."""

    @abstractmethod
    def bind(self, kind: Literal["k", "penalty"], initial: float, low: float, high: float, total_samples: int) -> None:
        """Called once before training with the knob's kind, start and range, and the budget in samples.

        Raises ConfigError when the controller's settings do not fit the knob."""

    @abstractmethod
    def update(self, measured: float | None, samples: int) -> float:
        """One control step.

        Args:
            measured: L0 of the previous optimizer step over the global batch, or None when there is none yet.
            samples: the clock, after the step just taken.

        Returns:
            The knob value for the next step, also in `strength`.
        """

    def state_dict(self) -> dict[str, float | int]:
        """Everything that a resumed run needs; numbers only."""
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """The inverse of `state_dict`."""
        self.strength = state["strength"]
