"""The inner loop: it holds the L0 of held-out rows at a set point that somebody else moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from pydantic import PositiveFloat

from sparsepilot.controllers.base import Measured, Plant
from sparsepilot.controllers.k_knob import KKnob
from sparsepilot.controllers.knob import FEWEST, Seen, log_l0
from sparsepilot.controllers.laws import average, clamp, keep_of
from sparsepilot.controllers.penalty_knob import PenaltyKnob
from sparsepilot.controllers.state import as_lists, as_tuples
from sparsepilot.errors import ConfigError

SMOOTH, RATIO_OVER = 0.1, 1.0
"""In lags: averages of L0, and of the error for the ratio."""
LARGEST_RATIO = 0.25
"""Nats between the L0 of held-out rows and of training that are believed."""
FELT = 2.0
"""Lags after a validation in which an upset shows that it has compared two plants: it does not count then."""


class LoopSettings(TypedDict, total=False):
    """What every closed-loop controller takes; the defaults are those of `L0Loop`."""

    initial_strength: PositiveFloat | None
    lowest: PositiveFloat
    highest: PositiveFloat
    proportional: PositiveFloat
    lag_steps: PositiveFloat


class L0Loop:
    """Turns a knob so that held-out rows have the L0 of a set point.

    It measures e = ln(L0 / L0*), both smoothed alike, so that a moving set point is not followed with the average's
    lag, and hands it to the knob: `PenaltyKnob` has the law of a penalty, `KKnob` that of a k.

    What training measures differs from what a validation measures (BatchTopK's threshold, rows seen several times):
    at each validation the loop takes the ratio of the two, and aims at L0* / ratio in training.

    All of its times are multiples of one lag: the optimizer steps until L0 answers a penalty. Adam remembers ten steps,
    and moves the weights by one learning rate in each, whatever the batch: the lag is a number of steps, not of
    samples (docs/decisions/0013).

    Args:
        initial_strength: of a penalty; None: 0.1 of the model's own coefficient. It may be wrong by 100 either way: one
            stronger than that is approached, as long as L0 stays above its set point.
        lowest: of a penalty's strength.
        highest: of a penalty's strength.
        proportional: nats of ln(strength) per nat of error, for a plant whose L0 falls by one nat per nat.
        lag_steps: optimizer steps until L0 answers.
    """

    own_state = ("_mean_l0", "_mean_set_point", "_train_error", "_log_ratio", "_error", "_validations", "_ratio_before")
    """Names of the attributes that a resumed run needs beside the knob's."""

    def __init__(
        self,
        initial_strength: float | None = None,
        lowest: float = 1e-6,
        highest: float = 1e6,
        proportional: float = 0.5,
        lag_steps: float = 20.0,
    ) -> None:
        if lowest >= highest:
            raise ConfigError(f"controller.lowest = {lowest:g}: must lie below controller.highest = {highest:g}")
        self.initial_strength, self.lowest, self.highest = initial_strength, lowest, highest
        self.proportional, self.lag_steps = proportional, lag_steps

    def bind(self, plant: Plant, set_point: float) -> None:
        """Before training; `set_point` is where a k starts.

        Raises ConfigError where the knob cannot start there."""
        if plant.steered_by is not None:
            raise ConfigError(
                f"{plant.steered_by}; use controller=constant with it, or leave it out and let the controller steer"
            )
        if plant.kind == "k" and self.initial_strength is not None:
            raise ConfigError(
                f"controller.initial_strength = {self.initial_strength:g}: is a penalty's; this model's knob is k, "
                "which begins at the set point: leave it out"
            )
        self.plant, self.lag = plant, self.lag_steps * plant.batch
        self.knob: KKnob | PenaltyKnob
        if plant.kind == "k":
            self.knob = KKnob(plant, set_point, self.lag)
        else:
            self.knob = PenaltyKnob(
                plant, self.initial_strength, self.lowest, self.highest, self.proportional, self.lag_steps,
                SMOOTH * self.lag,
            )  # fmt: skip
        self._mean_l0: float | None = None
        self._mean_set_point = set_point
        self._train_error: tuple[float | None, float | None] = (None, None)
        self._log_ratio = 0.0
        self._ratio_before: tuple[float, float] | None = None
        self._validations = 0
        self._error = 0.0

    @property
    def strength(self) -> float:
        """The knob's present value."""
        return self.knob.strength

    @property
    def ratio(self) -> float:
        """L0 of held-out rows over that of training, as last seen."""
        return math.exp(self._log_ratio)

    @property
    def l0(self) -> float | None:
        """The L0 of held-out rows as far as it is known: training's, smoothed, times the ratio."""
        return None if self._mean_l0 is None else self._mean_l0 * self.ratio

    @property
    def error(self) -> float:
        """ln(L0 / L0*), smoothed."""
        return self._error

    def step(self, measured: Measured, was: float, now: float, planned: float = 0.0) -> float:
        """One control step.

        Args:
            measured: an optimizer step, the one before that which has just been taken.
            was: the set point that has held since; that of the measured step is so little away that both, averaged
                alike, are compared.
            now: the set point from here on.
            planned: nats by which it has moved since, where that was given beforehand.
        """
        batch, lag = self.plant.batch, self.lag
        keep = keep_of(batch, SMOOTH * lag)
        self._mean_set_point = average(None if self._mean_l0 is None else self._mean_set_point, was, keep)
        self._mean_l0 = mean_l0 = average(self._mean_l0, measured.l0, keep)
        # twice averaged, so that the lag of the one can be taken off by the other (Brown's double smoothing)
        keep = keep_of(batch, RATIO_OVER * lag)
        once = average(self._train_error[0], log_l0(measured.l0, over=was), keep)
        self._train_error = (once, average(self._train_error[1], once, keep))
        self._error = self._error_of(mean_l0)
        upset = self.knob.turn(
            Seen(measured, was, now, planned, mean_l0, self._mean_set_point, self._error, self.ratio)
        )
        if upset and self._ratio_before is not None:  # that validation has seen what training had not felt yet
            self._log_ratio, _ = self._ratio_before
        self._ratio_before = _fresh(self._ratio_before, batch, FELT * lag)
        return self.strength

    def _error_of(self, mean_l0: float) -> float:
        return math.log(max(mean_l0, FEWEST) * self.ratio / self._mean_set_point)

    def begin(self) -> None:
        """Puts a penalty where it begins."""
        assert isinstance(self.knob, PenaltyKnob)
        self.knob.begin()

    def put(self, strength: float) -> None:
        """Puts a penalty where an outer law wants it."""
        assert isinstance(self.knob, PenaltyKnob)
        self.knob.put(strength)

    def disturb(self, factor: float) -> None:
        """Multiplies the knob, from outside: a penalty's strength, or the k in use."""
        if factor != 1.0:
            self.knob.disturb(factor)

    def observe(self, row: Mapping[str, object], now: float) -> None:
        """A validation's row; `now` is the set point that held when it was made."""
        l0 = row.get("val/l0")
        once, twice = self._train_error
        if not isinstance(l0, float) or not 0 < l0 < math.inf or once is None or twice is None:
            return
        error = 2 * once - twice
        seen = math.log(l0 / now) - error
        if not self.knob.believes(seen, self._log_ratio, error):
            return
        self._ratio_before = (self._log_ratio, 0.0)
        self._validations += 1
        weight = max(self.knob.ratio_weight, 1 / (1 + self._validations))  # 1 counts as one validation, the first
        self._log_ratio = average(self._log_ratio, clamp(seen, -LARGEST_RATIO, LARGEST_RATIO), 1 - weight)

    def readings(self) -> dict[str, float]:
        """As `Controller.readings`, and P and I of a penalty."""
        readings = {"strength": self.strength}
        if self._mean_l0 is None:
            return readings
        return readings | {
            "target": self._mean_set_point,
            "measured": self._mean_l0 * self.ratio,
            # not that of the step: a validation since then may have taught another ratio
            "error": self._error_of(self._mean_l0),
            **self.knob.readings(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and lists of them."""
        return {name: as_lists(getattr(self, name)) for name in self.own_state} | self.knob.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in self.own_state:
            setattr(self, name, as_tuples(state[name]))
        self.knob.load_state_dict(state)


def _fresh(before: tuple[float, float] | None, samples: float, lasts: float) -> tuple[float, float] | None:
    """The ratio before a validation, and the samples since; None once that is long ago.

    >>> _fresh((0.1, 60.0), 20, 100), _fresh((0.1, 80.0), 20, 100)
    ((0.1, 80.0), None)
    """
    return None if before is None or before[1] + samples >= lasts else (before[0], before[1] + samples)
