"""The inner loop: the only place that knows a knob. It holds L0 at a set point that somebody else moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from pydantic import PositiveFloat

from sparsepilot.controllers.base import KNOB_FIELDS, Measured, Plant
from sparsepilot.controllers.laws import PI, GainEstimate, Gains, average, clamp, estimate_gain, keep_of, pi_step
from sparsepilot.controllers.upset import Calm, Upset, upset_step
from sparsepilot.errors import ConfigError

COHERENT = 0.9
"""Share of the thresholds' motion in one direction from which on they count as running at their limit,"""
CREEP = 0.02
"""where L0 follows by so many nats in a lag: a wide kernel's weights may undo it all, and want more strength."""
FEWEST = 1e-3
"""L0 that stands for none at all, where its logarithm is needed."""
SMOOTH, SLOPE_OVER, RATIO_OVER = 0.1, 0.5, 1.0
"""In lags: averages of L0, of the error for its slope and for the ratio."""
RATIO_WEIGHT = {"k": 0.5, "penalty": 0.4}
"""Of the last validation in the ratio. Where a k is set, the ratio moves (BatchTopK's threshold settles) and is hardly
noisy; a penalty's L0 at one instant is a few percent beside its mean, which must not become the set point's error."""
LARGEST_RATIO = 0.25
"""Nats between the L0 of held-out rows and of training that are believed, and of a penalty's error near enough to the
set point for their ratio to say something about the one there."""
FOLLOWING, INTEGRATING = (1.0, 1.0, 10.0, 0.0025), (6.0, 5.0, math.inf, math.inf)
"""Factor of the proportional gain; integral and drift times in lags; the most that the noise of single batches may move
ln(strength) by through P. A plant that integrates already wants mostly P, and evens out its noise itself."""
BEGIN = 0.1
"""Strength at the start, as a share of the model's own coefficient: one that is too weak costs a little time, one that
is too strong costs latents."""
COLLAPSING, BRAKE = -0.7, 5.0
"""Where L0 falls and will be lower than its set point by so many nats in a lag, latents are being lost:
ln(strength) goes down by so many nats in a lag, whatever the gains."""
FALLING = 0.1
"""Nats in a lag from which on L0 counts as falling."""
RISE, ENOUGH = 0.5, -0.1
"""Nats in a lag by which ln(strength) rises from where it begins by default to a stronger start, and the error, as it
will be in a lag, at which it goes no further: a start that is too strong is seen before it kills. Nor does it rise
where thresholds run at their limit: they go no faster for more."""
UNFELT = 2.0
"""Lags of that rise that are taken back then."""
FADE_IN = 3.0
"""Lags over which a penalty fades in, quadratically, so that one far too strong is seen before it kills."""
SWING, SWING_OVER = 0.02, 3.0
"""Rms of the error's fast part, noise taken off, at which the gain is halved, and the lags over which it is taken: near
the collapse a plant answers several times as strongly, and sooner than its lag, and the loop alone would keep it
swinging."""
SOFTEST = 10.0
"""Most that P is divided by for noise, and the gain, but for 1, for a swing: a jump is neither, and soon forgotten."""
LEAST, OUTLIER = 0.01**2, 9.0
"""Variance of noise that always counts as ordinary; how many times the usual one a single deviation counts at most."""
FORCE = {False: 1.0, True: 8.0}
"""Times as strong that P is, and as fast the strength, while L0 is brought back from an upset: of a plant that follows
(more than what it has without softening swings it to the other side); of one that integrates."""
FARTHEST_FORCED = 6.0
"""Nats that this moves ln(strength) by at most: what is next to nothing, and soon back from there."""
FELT = 2.0
"""Lags after a validation in which an upset shows that it has compared two plants: it does not count then."""
RATE = 10.0
"""Nats that ln(strength) moves at most in a lag."""
STATE = (
    "strength", "_pi", "_estimate", "_mean_l0", "_mean_set_point", "_slow_error", "_train_error", "_log_ratio",
    "_error", "_slewing", "_steps", "_swing", "_noise", "_validations", "_start", "_upset", "_ratio_before",
)  # fmt: skip


def lowest_l0(plant: Plant) -> float:
    """The least L0 that may be asked of what is steered."""
    return plant.low if plant.kind == "k" else FEWEST


class LoopSettings(TypedDict, total=False):
    """What every closed-loop controller takes; the defaults are those of `L0Loop`."""

    initial_strength: PositiveFloat | None
    lowest: PositiveFloat
    highest: PositiveFloat
    proportional: PositiveFloat
    lag_steps: PositiveFloat


class L0Loop:
    """Turns a knob so that held-out rows have the L0 of a set point.

    A penalty is turned by a PI law on ln(strength) (`laws.pi_step`) with e = ln(L0 / L0*), both smoothed alike, so that
    a moving set point is not followed with the average's lag. Its proportional gain is divided by what the plant's is
    estimated to be (`laws.estimate_gain`). k itself is set to the set point.

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
        self.plant = plant
        self.strength = set_point
        low, high = plant.low, plant.high
        if plant.kind == "penalty":
            self.strength = self.initial_strength or plant.initial
            low, high = max(self.lowest, low), min(self.highest, high)
        if not low <= self.strength <= high:
            field = "controller.initial_strength" if self.initial_strength else KNOB_FIELDS[plant.kind]
            raise ConfigError(f"{field} = {self.strength:g}: should lie between {low:g} and {high:g}")
        self._low, self._high = low, high
        self.lag = lag = self.lag_steps * plant.batch
        stronger, slower, drift_after, self._most_noise = INTEGRATING if plant.integrates else FOLLOWING
        self._proportional = stronger * self.proportional
        self._gains = Gains(
            self._proportional, slower * lag, drift_after * lag, 1.0, RATE / lag, math.log(low), math.log(high)
        )
        self._set(math.log(self.strength))
        if plant.kind == "penalty":
            self.begin()
        self._estimate = GainEstimate()
        self._mean_l0: float | None = None
        self._mean_set_point = set_point
        self._slow_error: float | None = None
        self._train_error: tuple[float | None, float | None] = (None, None)
        self._log_ratio = 0.0
        self._validations = 0
        self._error = 0.0
        self._slewing = False
        self._swing = (0.0, 0.0)
        self._noise: tuple[float, float | None, float | None] = (0.0, None, None)
        self._ratio_before: tuple[float, float] | None = None
        self._steps = 0
        if plant.kind == "penalty":
            self.strength = self._faded_in()

    def begin(self) -> None:
        """Puts a penalty where it begins; `initial_strength`, where that is stronger, is approached from there."""
        default = clamp(BEGIN * self.plant.initial, self._low, self._high)
        wanted = math.log(self.initial_strength or default)
        u = min(wanted, math.log(default))
        self._set(u, wanted - u)
        self.strength = math.exp(u)

    def _set(self, u: float, to_rise: float = 0.0) -> None:
        """ln(strength) is `u` from here on, without a jump, and has so many nats to rise."""
        self._pi, self._start, self._upset = PI(u, u), (to_rise, 0.0), Upset()

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

    def step(self, measured: Measured, was: float, now: float) -> float:
        """One control step.

        Args:
            measured: an optimizer step.
            was: the set point that held in it.
            now: the set point of the next one.
        """
        batch, lag = self.plant.batch, self.lag
        keep = keep_of(batch, SMOOTH * lag)
        self._mean_set_point = average(None if self._mean_l0 is None else self._mean_set_point, was, keep)
        self._mean_l0 = average(self._mean_l0, measured.l0, keep)
        # twice averaged, so that the lag of the one can be taken off by the other (Brown's double smoothing)
        keep = keep_of(batch, RATIO_OVER * lag)
        once = average(self._train_error[0], math.log(max(measured.l0, FEWEST) / was), keep)
        self._train_error = (once, average(self._train_error[1], once, keep))
        self._error = math.log(max(self._mean_l0, FEWEST) * self.ratio / self._mean_set_point)
        if self.plant.kind == "k":
            self.strength = clamp(now / self.ratio, self._low, self._high)
        else:
            self._turn_penalty(measured, math.log(max(measured.l0, FEWEST) / was))
        return self.strength

    def _turn_penalty(self, measured: Measured, error_of_step: float) -> None:
        batch, lag = self.plant.batch, self.lag
        assert self._mean_l0 is not None
        answer = math.log(max(self._mean_l0, FEWEST))
        self._estimate = estimate_gain(self._estimate, self._pi.output, answer, batch, lag)
        # an error that will be gone within a lag at its present pace needs nothing more than what made it go
        self._slow_error = average(self._slow_error, self._error, keep_of(batch, SLOPE_OVER * lag))
        in_a_lag = self._error + (self._error - self._slow_error) / SLOPE_OVER
        runs = math.copysign(1.0, self._error) * measured.coherence > COHERENT
        self._slewing = runs and abs(self._error) - abs(in_a_lag) > CREEP
        self._approach_start(in_a_lag, batch, lag)
        set_point = math.log(self._mean_set_point)
        self._upset, integral = upset_step(
            self._upset, set_point, self._error, self._slow_error, self._pi.output, batch, lag, self.plant.integrates
        )
        if integral is not None:
            self._pi = self._pi._replace(integral=integral, drift=0.0)
            if self._ratio_before is not None:  # that validation has seen what training had not felt yet
                self._log_ratio, _ = self._ratio_before
        self._ratio_before = _fresh(self._ratio_before, batch, FELT * lag)
        stays, force = self._upset.left > 0, FORCE[self.plant.integrates] if self._upset.side else 1.0
        noise, proportional = self._noise_of(error_of_step, batch, lag), self._proportional / self._estimate.gain
        soften = self._soften(noise, batch, lag)
        if self._upset.side:
            proportional, quieter = force * proportional, 1.0
        else:
            proportional /= soften
            quieter = clamp(proportional * noise / self._most_noise, 1.0, SOFTEST)
        gains = self._gains._replace(
            proportional=proportional / quieter,
            integral_samples=self._gains.integral_samples / quieter * force,
            largest_error=min(1.0, FARTHEST_FORCED / proportional) if force > 1.0 else 1.0,
            rate=force * self._gains.rate,
        )
        if not stays and force == 1.0 and in_a_lag < COLLAPSING and in_a_lag < self._error - FALLING:
            integral = clamp(self._pi.integral - BRAKE * batch / lag, gains.low, gains.high)
            self._pi = self._pi._replace(integral=integral, drift=0.0)
        hold = self._slewing or stays or in_a_lag * self._error < 0
        self._pi = pi_step(self._pi, self._error, batch, gains, hold=hold)
        self._steps += 1
        self.strength = self._faded_in()

    def _approach_start(self, in_a_lag: float, batch: int, lag: float) -> None:
        """One step from where ln(strength) begins by default to a stronger start."""
        left, risen = self._start
        if left > 0 and (self._slewing or in_a_lag < ENOUGH):
            left, rise = 0.0, -min(risen, UNFELT * RISE)  # the last lags' rise has not answered yet
        else:
            rise = min(left, RISE * batch / lag)
            left -= rise
        self._start = (left, risen + rise)
        self._pi = self._pi._replace(integral=self._pi.integral + rise)

    def _noise_of(self, error: float, batch: int, lag: float) -> float:
        """Standard deviation that the noise of single batches leaves in the smoothed error.

        White noise has six times its variance in second differences, which a steady fall or a slow swing has not."""
        variance, before, once_more = self._noise
        if before is not None and once_more is not None:
            bend = (error - 2 * before + once_more) ** 2 / 6
            variance = average(variance, min(bend, OUTLIER * max(variance, LEAST)), keep_of(batch, SWING_OVER * lag))
        self._noise = (variance, error, before)
        keep = keep_of(batch, SMOOTH * lag)
        return math.sqrt(variance * (1 - keep) / (1 + keep))

    def _soften(self, noise: float, batch: int, lag: float) -> float:
        """What the gain is divided by, so that an oscillation does not feed itself."""
        assert self._slow_error is not None
        fast = self._error - self._slow_error
        mean = average(self._swing[0], fast, keep_of(batch, lag))
        swing = min((fast - mean) ** 2, SOFTEST * SWING**2)
        variance = average(self._swing[1], swing, keep_of(batch, SWING_OVER * lag))
        self._swing = (mean, variance)
        return 1.0 + max(0.0, variance - noise**2) / SWING**2

    def _faded_in(self) -> float:
        share = min(1.0, (self._steps + 1) / (FADE_IN * self.lag_steps))
        return max(math.exp(self._pi.output) * share**2, self.lowest)

    def put(self, strength: float) -> None:
        """Puts a penalty where an outer law wants it; the loop goes on from there without a jump."""
        u = math.log(clamp(strength, self._low, self._high))
        self._set(u)
        self.strength = math.exp(u)

    def disturb(self, factor: float) -> None:
        """Multiplies the knob, from outside: a penalty's strength; or the k in use, until validations have told the
        loop."""
        if factor == 1.0:
            return
        if self.plant.kind == "k":
            self._log_ratio -= math.log(factor)
            self.strength = clamp(self.strength * factor, self._low, self._high)
            return
        u = clamp(self._pi.output + math.log(factor), self._gains.low, self._gains.high)
        self._pi = self._pi._replace(
            output=u, integral=clamp(self._pi.integral + math.log(factor), self._gains.low, self._gains.high)
        )
        self.strength = math.exp(u)

    def observe(self, row: Mapping[str, object], now: float) -> None:
        """A validation's row; `now` is the set point that held when it was made."""
        l0 = row.get("val/l0")
        once, twice = self._train_error
        if not isinstance(l0, float) or not 0 < l0 < math.inf or once is None or twice is None:
            return
        error = 2 * once - twice
        upset = self._upset.side != 0 or self._upset.left > 0
        if self.plant.kind == "penalty" and (upset or abs(error) > LARGEST_RATIO):
            return
        self._ratio_before = (self._log_ratio, 0.0)
        seen = math.log(l0 / now) - error
        self._validations += 1
        weight = max(
            RATIO_WEIGHT[self.plant.kind], 1 / (1 + self._validations)
        )  # 1 counts as one validation, the first
        self._log_ratio = average(self._log_ratio, clamp(seen, -LARGEST_RATIO, LARGEST_RATIO), 1 - weight)

    def readings(self) -> dict[str, float]:
        """As `Controller.readings`, and P and I of a penalty."""
        readings = {"strength": self.strength}
        if self._mean_l0 is None:
            return readings
        readings |= {
            "target": self._mean_set_point,
            "measured": self._mean_l0 * self.ratio,
            # not that of the step: a validation since then may have taught another ratio
            "error": math.log(max(self._mean_l0, FEWEST) * self.ratio / self._mean_set_point),
        }
        if self.plant.kind == "k":
            return {**readings, "at_limit": float(self.strength in (self._low, self._high))}
        return {
            **readings,
            "at_limit": float(self._pi.at_limit or self._slewing),
            "p": self._pi.proportional,
            "i": self._pi.integral,
            "plant_gain": self._estimate.gain,
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and lists of them."""
        return {name: as_lists(getattr(self, name)) for name in STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in STATE:
            setattr(self, name, as_tuples(state[name]))
        self._pi, self._estimate = PI(*self._pi), GainEstimate(*self._estimate)
        calm, *rest = self._upset
        self._upset = Upset(Calm(*calm), *rest)


def _fresh(before: tuple[float, float] | None, samples: float, lasts: float) -> tuple[float, float] | None:
    """The ratio before a validation, and the samples since; None once that is long ago.

    >>> _fresh((0.1, 60.0), 20, 100), _fresh((0.1, 80.0), 20, 100)
    ((0.1, 80.0), None)
    """
    return None if before is None or before[1] + samples >= lasts else (before[0], before[1] + samples)


def as_lists(value: Any) -> Any:
    """Tuples, within each other, too, as a state dict holds them."""
    return [as_lists(part) for part in value] if isinstance(value, tuple) else value


def as_tuples(value: Any) -> Any:
    """The inverse of `as_lists`."""
    return tuple(as_tuples(part) for part in value) if isinstance(value, list) else value
