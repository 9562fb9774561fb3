"""A penalty: its strength is found by a PI law."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsepilot.controllers.base import Plant
from sparsepilot.controllers.knob import Knob, Seen, log_l0
from sparsepilot.controllers.laws import PI, GainEstimate, Gains, clamp, estimate_gain, keep_of, pi_step
from sparsepilot.controllers.motion import Motion, collapses, follows, motion_step
from sparsepilot.controllers.steadiness import Noise, Swing, noise_after, noise_step, quieting, softening, swing_step
from sparsepilot.controllers.upset import Calm, Upset, upset_step

COHERENT = 0.9
"""Share of the thresholds' motion in one direction from which on they run at their limit, where L0 follows."""
NEAR = 0.25
"""Nats of error within which a validation says something about the ratio at the set point."""
FOLLOWING, INTEGRATING = (1.0, 1.0, 10.0, 0.0025), (6.0, 5.0, math.inf, math.inf)
"""Factor of the proportional gain; integral and drift times in lags; the most that the noise of single batches may move
ln(strength) by through P. A plant that integrates already wants mostly P, and evens out its noise itself."""
BEGIN = 0.1
"""Strength at the start, as a share of the model's own coefficient: one that is too weak costs a little time, one that
is too strong costs latents."""
BRAKE = 5.0
"""Nats in a lag by which ln(strength) goes down where L0 collapses, whatever the gains."""
RISE, ENOUGH = 0.5, -0.1
"""Nats in a lag by which ln(strength) rises from where it begins by default to a stronger start, and the error, as it
will be in a lag, at which it goes no further: a start that is too strong is seen before it kills. Nor does it rise
where thresholds run at their limit: they go no faster for more."""
UNFELT = 2.0
"""Lags of that rise that are taken back then."""
FADE_IN = 3.0
"""Lags over which a penalty fades in, quadratically, so that one far too strong is seen before it kills."""
FORCE = {False: 1.0, True: 8.0}
"""Times as strong that P is, and as fast the strength, while L0 is brought back from an upset: of a plant that follows
(more than what it has without softening swings it to the other side); of one that integrates."""
FARTHEST_FORCED = 6.0
"""Nats that this moves ln(strength) by at most: what is next to nothing, and soon back from there."""
RATE = 10.0
"""Nats that ln(strength) moves at most in a lag."""


class PenaltyKnob(Knob):
    """The coefficient of a penalty.

    A PI law (`laws.pi_step`) on ln(strength), whose proportional gain is divided by what the plant's is estimated to be
    (`laws.estimate_gain`), by what its own swing asks for (`steadiness`), and which goes back to what held before where
    something has happened (`upset`).

    Args:
        plant: whose knob it is.
        initial_strength: where to begin; None: BEGIN times the model's own coefficient. A stronger one is approached.
        lowest, highest: bounds of the strength.
        proportional: nats of ln(strength) per nat of error, for a plant whose L0 falls by one nat per nat.
        lag_steps: optimizer steps until L0 answers.
        smooth_samples: over which the error that it is given is averaged.
    """

    # L0 at one instant is a few percent beside its mean, which must not become the set point's error
    ratio_weight = 0.4
    state = (
        "strength", "_pi", "_estimate", "_motion", "_slewing", "_steps", "_swing", "_noise", "_start", "_upset",
    )  # fmt: skip

    def __init__(
        self,
        plant: Plant,
        initial_strength: float | None,
        lowest: float,
        highest: float,
        proportional: float,
        lag_steps: float,
        smooth_samples: float,
    ) -> None:
        low, high = max(lowest, plant.low), min(highest, plant.high)
        field = "controller.initial_strength" if initial_strength else None
        super().__init__(plant, initial_strength or plant.initial, low, high, field)
        self.initial_strength, self.lowest = initial_strength, lowest
        self._lag_steps, self._smooth_samples = lag_steps, smooth_samples
        self._lag = lag = lag_steps * plant.batch
        stronger, slower, drift_after, self._most_noise = INTEGRATING if plant.integrates else FOLLOWING
        self._proportional = stronger * proportional
        self._gains = Gains(
            self._proportional, slower * lag, drift_after * lag, 1.0, RATE / lag, math.log(low), math.log(high)
        )
        self.begin()
        self._estimate = GainEstimate()
        self._motion = Motion()
        self._slewing = False
        self._swing, self._noise = Swing(), Noise()
        self._steps = 0
        self.strength = self._faded_in()

    def begin(self) -> None:
        """Puts it where it begins; `initial_strength`, where that is stronger, is approached from there."""
        default = clamp(BEGIN * self.plant.initial, self.low, self.high)
        wanted = math.log(self.initial_strength or default)
        u = min(wanted, math.log(default))
        self._set(u, wanted - u)

    def put(self, strength: float) -> None:
        """Puts it where an outer law wants it; it goes on from there without a jump."""
        self._set(math.log(clamp(strength, self.low, self.high)))

    def _set(self, u: float, to_rise: float = 0.0) -> None:
        """ln(strength) is `u` from here on, without a jump, and has so many nats to rise."""
        self._pi, self._start, self._upset = PI(u, u), (to_rise, 0.0), Upset()
        self.strength = math.exp(u)

    def turn(self, seen: Seen) -> bool:
        batch, lag, error = self.plant.batch, self._lag, seen.error
        answer = log_l0(seen.mean_l0)
        self._estimate = estimate_gain(self._estimate, self._pi.output, answer, batch, lag)
        self._motion = motion_step(self._motion, error, answer, batch, lag)
        assert self._motion.slow_error is not None
        runs = math.copysign(1.0, error) * seen.measured.coherence > COHERENT
        self._slewing = runs and follows(self._motion, error, integrates=self.plant.integrates)
        self._approach_start()
        self._upset, integral = upset_step(
            self._upset, math.log(seen.mean_set_point), error, self._motion.slow_error, self._pi.output, batch, lag,
            self.plant.integrates,
        )  # fmt: skip
        if integral is not None:
            self._pi = self._pi._replace(integral=integral, drift=0.0)
        stays, force = self._upset.left > 0, FORCE[self.plant.integrates] if self._upset.side else 1.0
        gains = self._gains_now(log_l0(seen.measured.l0, over=seen.was), error - self._motion.slow_error, force)
        if not stays and force == 1.0 and collapses(self._motion, error):
            braked = clamp(self._pi.integral - BRAKE * batch / lag, gains.low, gains.high)
            self._pi = self._pi._replace(integral=braked, drift=0.0)
        # an error that will be gone within a lag at its present pace needs nothing more than what made it go
        hold = self._slewing or stays or self._motion.error_in_a_lag * error < 0
        if self.plant.integrates:  # there is no drift term that would learn how fast a given set point moves
            led = clamp(self._pi.integral - seen.planned / self._estimate.gain, gains.low, gains.high)
            self._pi = self._pi._replace(integral=led)
        self._pi = pi_step(self._pi, error, batch, gains, hold=hold)
        self._steps += 1
        self.strength = self._faded_in()
        return integral is not None

    def _gains_now(self, error_of_step: float, fast: float, force: float) -> Gains:
        """Those of the estimated plant: softer where the loop swings, quieter where batches are noisy, and with force
        while L0 is brought back.

        Args:
            error_of_step: ln(L0 / L0*) of the measured step by itself.
            fast: the error less its average over half a lag.
            force: as FORCE; 1 where nothing is brought back.
        """
        batch, lag = self.plant.batch, self._lag
        self._noise = noise_step(self._noise, error_of_step, batch, lag)
        self._swing = swing_step(self._swing, fast, batch, lag)
        proportional, quieter = force * self._proportional / self._estimate.gain, 1.0
        if not self._upset.side:
            noise = noise_after(self._noise, keep_of(batch, self._smooth_samples))
            proportional /= softening(self._swing, noise)
            quieter = quieting(proportional, noise, self._most_noise)
        return self._gains._replace(
            proportional=proportional / quieter,
            integral_samples=self._gains.integral_samples / quieter * force,
            largest_error=min(1.0, FARTHEST_FORCED / proportional) if force > 1.0 else 1.0,
            rate=force * self._gains.rate,
        )

    def _approach_start(self) -> None:
        """One step from where ln(strength) begins by default to a stronger start."""
        left, risen = self._start
        if left > 0 and (self._slewing or self._motion.error_in_a_lag < ENOUGH):
            left, rise = 0.0, -min(risen, UNFELT * RISE)  # the last lags' rise has not answered yet
        else:
            rise = min(left, RISE * self.plant.batch / self._lag)
            left -= rise
        self._start = (left, risen + rise)
        self._pi = self._pi._replace(integral=self._pi.integral + rise)

    def _faded_in(self) -> float:
        share = min(1.0, (self._steps + 1) / (FADE_IN * self._lag_steps))
        return max(math.exp(self._pi.output) * share**2, self.lowest)

    def believes(self, log_ratio: float, before: float, error: float) -> bool:
        upset = self._upset.side != 0 or self._upset.left > 0
        return not upset and abs(error) <= NEAR

    def disturb(self, factor: float) -> None:
        u = clamp(self._pi.output + math.log(factor), self._gains.low, self._gains.high)
        integral = clamp(self._pi.integral + math.log(factor), self._gains.low, self._gains.high)
        self._pi = self._pi._replace(output=u, integral=integral)
        self.strength = math.exp(u)

    def readings(self) -> dict[str, float]:
        return {
            "at_limit": float(self._pi.at_limit or self._slewing),
            "p": self._pi.proportional,
            "i": self._pi.integral,
            "plant_gain": self._estimate.gain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._pi, self._estimate, self._motion = PI(*self._pi), GainEstimate(*self._estimate), Motion(*self._motion)
        self._swing, self._noise = Swing(*self._swing), Noise(*self._noise)
        calm, *rest = self._upset
        self._upset = Upset(Calm(*calm), *rest)
