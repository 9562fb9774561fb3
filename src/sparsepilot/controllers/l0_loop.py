"""The inner loop: the only place that knows a knob. It holds L0 at a set point that somebody else moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

from pydantic import NonNegativeFloat, PositiveFloat

from sparsepilot.controllers.base import Measured, Plant
from sparsepilot.controllers.laws import PI, Gains, average, keep_of, pi_step
from sparsepilot.errors import ConfigError

COHERENT = 0.9
"""Share of the thresholds' motion in one direction from which on they count as running at their limit."""
FEWEST = 1e-3
"""L0 that stands for none at all, where its logarithm is needed."""


class LoopSettings(TypedDict, total=False):
    """What every closed-loop controller takes; the defaults are those of `L0Loop`."""

    initial_strength: PositiveFloat | None
    lowest: PositiveFloat
    highest: PositiveFloat
    proportional: PositiveFloat
    integral: PositiveFloat
    smoothing: NonNegativeFloat
    rate: PositiveFloat


class L0Loop:
    """Turns a knob so that held-out rows have the L0 of a set point.

    A penalty is turned by a PI law on ln(strength): u = P + I, P = proportional * e, dI/dn = P / integral_samples, with
    e = ln(L0 / L0*), both averaged over `smoothing` alike, so that a moving set point is not followed with the
    average's lag. k itself is set to the set point.

    What training measures differs from what a validation measures (BatchTopK's threshold, rows seen several times):
    at each validation the loop takes the ratio of the two, and aims at L0* / ratio in training.

    Gains and times are shares of the budget, hence samples: they hold for any batch size.

    Args:
        initial_strength: of a penalty; None: the model's own coefficient.
        lowest: of a penalty's strength.
        highest: of a penalty's strength.
        proportional: nats of ln(strength) per nat of error.
        integral: share of the budget after which a constant error counts double.
        smoothing: share of the budget over which L0 is averaged.
        rate: nats by which ln(strength) moves at most in 1% of the budget.
    """

    def __init__(
        self,
        initial_strength: float | None = None,
        lowest: float = 1e-6,
        highest: float = 1e6,
        proportional: float = 2.0,
        integral: float = 0.01,
        smoothing: float = 0.002,
        rate: float = 10.0,
    ) -> None:
        if lowest >= highest:
            raise ConfigError(f"controller.lowest = {lowest:g}: must lie below controller.highest = {highest:g}")
        self.initial_strength, self.lowest, self.highest = initial_strength, lowest, highest
        self.proportional, self.integral, self.smoothing, self.rate = proportional, integral, smoothing, rate

    def bind(self, plant: Plant, set_point: float) -> None:
        """Before training; `set_point` is where a k starts.

        Raises ConfigError where the knob cannot start there."""
        self.plant = plant
        self.strength = set_point
        low, high = plant.low, plant.high
        if plant.kind == "penalty":
            self.strength = float(self.initial_strength or plant.initial)
            low, high = max(self.lowest, low), min(self.highest, high)
        if not low <= self.strength <= high:
            field = "controller.initial_strength" if self.initial_strength else "model.coefficient"
            raise ConfigError(f"{field} = {self.strength:g}: should lie between {low:g} and {high:g}")
        total = plant.total_samples
        self._low, self._high = low, high
        self._gains = Gains(
            self.proportional, self.integral * total, 1.0, self.rate / (0.01 * total), math.log(low), math.log(high)
        )
        u = math.log(self.strength)
        self._pi = PI(u, u, 0.0, at_limit=False)
        self._mean_l0: float | None = None
        self._mean_set_point = set_point
        self._log_ratio: float | None = None
        self._error = 0.0

    @property
    def lowest_l0(self) -> float:
        """The least L0 that may be asked of what is steered."""
        return self.plant.low if self.plant.kind == "k" else FEWEST

    @property
    def ratio(self) -> float:
        """L0 of held-out rows over that of training, as last seen."""
        return 1.0 if self._log_ratio is None else math.exp(self._log_ratio)

    @property
    def l0(self) -> float | None:
        """The L0 of held-out rows as far as it is known: training's, smoothed, times the ratio."""
        return None if self._mean_l0 is None else self._mean_l0 * self.ratio

    @property
    def error(self) -> float:
        """ln(L0 / L0*), smoothed."""
        return self._error

    def step(self, measured: Measured, was: float, now: float) -> float:
        """One control step.

        Args:
            measured: an optimizer step.
            was: the set point that held in it.
            now: the set point of the next one.
        """
        plant = self.plant
        keep = keep_of(plant.batch, self.smoothing * plant.total_samples)
        self._mean_set_point = average(None if self._mean_l0 is None else self._mean_set_point, was, keep)
        self._mean_l0 = average(self._mean_l0, measured.l0, keep)
        self._error = math.log(max(self._mean_l0, FEWEST) * self.ratio / self._mean_set_point)
        if plant.kind == "k":
            self.strength = min(self._high, max(self._low, now / self.ratio))
        else:
            self._pi = pi_step(self._pi, self._error, plant.batch, self._gains, hold=measured.coherence > COHERENT)
            self.strength = math.exp(self._pi.output)
        return self.strength

    def wait(self, strength: float) -> None:
        """Puts a penalty where an outer law wants it, so that the loop later goes on from there without a jump."""
        u = math.log(min(self._high, max(self._low, strength)))
        self._pi = PI(u, u, 0.0, at_limit=False)
        self.strength = math.exp(u)

    def observe(self, row: Mapping[str, object], now: float) -> None:
        """A validation's row; `now` is the set point that held when it was made."""
        l0 = row.get("val/l0")
        if not isinstance(l0, float) or l0 <= 0 or not self._mean_l0:
            return
        # what training measures now: the average, moved along by what the set point has moved since
        seen = math.log(l0 / (self._mean_l0 * now / self._mean_set_point))
        self._log_ratio = min(0.5, max(-0.5, average(self._log_ratio, seen, 0.5)))

    def readings(self) -> dict[str, float]:
        """As `Controller.readings`, and P and I of a penalty."""
        readings = {"strength": self.strength}
        if self._mean_l0 is None:
            return readings
        readings |= {
            "target": self._mean_set_point,
            "measured": self._mean_l0 * self.ratio,
            "error": self._error,
        }
        if self.plant.kind == "k":
            return {**readings, "at_limit": float(self.strength in (self._low, self._high))}
        at_limit = float(self._pi.at_limit)
        return {**readings, "at_limit": at_limit, "p": self._pi.proportional, "i": self._pi.integral}

    def state_dict(self) -> dict[str, float | None]:
        """Numbers only."""
        return {
            "loop_strength": self.strength,
            "output": self._pi.output,
            "integral": self._pi.integral,
            "proportional": self._pi.proportional,
            "at_limit": float(self._pi.at_limit),
            "mean_l0": self._mean_l0,
            "mean_set_point": self._mean_set_point,
            "log_ratio": self._log_ratio,
            "error": self._error,
        }

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """The inverse of `state_dict`."""
        given = {name: float(value) for name, value in state.items() if value is not None}
        self.strength = given["loop_strength"]
        self._pi = PI(given["output"], given["integral"], given["proportional"], bool(given["at_limit"]))
        self._mean_l0 = given.get("mean_l0")
        self._mean_set_point = given["mean_set_point"]
        self._log_ratio = given.get("log_ratio")
        self._error = given["error"]
