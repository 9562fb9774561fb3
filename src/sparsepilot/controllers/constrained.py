"""Closed loop: as sparse as a quality that must not get worse allows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Unpack

from pydantic import Field, PositiveFloat

from sparsepilot.controllers.base import Measured, Plant
from sparsepilot.controllers.closed_loop import ClosedLoop
from sparsepilot.controllers.knob import FEWEST, log_l0, lowest_l0
from sparsepilot.controllers.l0_loop import L0Loop, LoopSettings
from sparsepilot.controllers.laws import GainEstimate, average, clamp, keep_of
from sparsepilot.controllers.seek import Seek, SeekGains, seek_step
from sparsepilot.controllers.state import as_lists, as_tuples
from sparsepilot.errors import ConfigError
from sparsepilot.ranks import is_first

WAITING = 1e-3
"""Strength while waiting, as a share of the model's coefficient."""
FARTHEST = 1.0
"""Nats that the set point may be away from the L0 that there is."""
FARTHEST_AT_ONCE = 0.5
"""Nats by which one measurement may move it: measured seldom, the loop would swing from too dense to too sparse."""
RESPOND, RESPOND_LAGS, RESPOND_MEASURED = 0.02, 4.0, 3.0
"""Share of the budget, lags of the inner loop and spans between measurements, whichever is longest, in which a
violation shrinks by a factor of e."""
DEFAULT_FVU = 0.1
HOPELESS_AFTER, ALL, UNHEEDED = 0.125, 0.99, 2.0
"""Share of the budget, after waiting, in which the target must have been met once; a k counts as as high as can be at
this share of its highest value, and at so many times the L0 that there is."""


class Constrained(ClosedLoop):
    """Maximises sparsity subject to quality <= target, in the manner of GECO (Rezende & Viola 2018, arXiv 1810.00597).

    L0* follows the L0 that the target allows, as far as that can be told from the present L0 and
    v = ln(excess / allowed excess), with a learned drift (`seek.seek_step`): the dictionary gets better all the way, so
    that L0 goes on falling. Excess: the cross-entropy above the clean model's, or the FVU. Both fall about as a power
    of L0, whose exponent is learned. The inner loop (`L0Loop`) brings L0 to L0*.

    It moves only when a new measurement has arrived, by the samples since the last.

    Args:
        quality: what must not get worse: `fvu` of the training batches; or of the language model on held-out text
            (cross_entropy=spliced, best measured often) `ce`, its cross-entropy in nats per token, `ce_increase`, the
            same above the clean model's, or `ce_gap`, that increase as a share of the mean-ablated model's.
        target: what it may be at most; None: 0.1 for `fvu`, and not to be left out for the others.
        wait: share of the budget for which a penalty stays near 0, a k where it starts. After it a penalty begins where
            `l0_target` does, or at `initial_strength` where one is given.
        climb: nats that ln L0* falls by at most per 1% of the budget.
        recover: nats that it rises by at most.
        loop: settings of the inner loop.
    """

    own_state = ("strength", "_set_point", "_value", "_wanted", "_moved_at", "_best", "_said", "_begin", "_answer")

    def __init__(
        self,
        quality: Literal["fvu", "ce", "ce_increase", "ce_gap"],
        target: PositiveFloat | None = None,
        wait: Annotated[float, Field(ge=0, lt=1)] = 0.125,
        climb: PositiveFloat = 0.3,
        recover: PositiveFloat = 1.2,
        **loop: Unpack[LoopSettings],
    ) -> None:
        if target is None:
            if quality != "fvu":
                raise ConfigError(
                    f"controller.target = null: quality={quality} has no default; say what it may be at most"
                )
            target = DEFAULT_FVU
        if quality == "fvu" and target >= 1:
            raise ConfigError(f"controller.target = {target:g}: an fvu lies below 1, which no latent at all gives")
        if quality == "ce_gap" and target >= 1:
            raise ConfigError(f"controller.target = {target:g}: a ce_gap is a share, below 1, of clean to mean-ablated")
        if recover < climb:
            raise ConfigError(f"controller.recover = {recover:g}: at least controller.climb = {climb:g} is needed")
        self.quality, self.target = quality, target
        self.wait, self.climb, self.recover = wait, climb, recover
        self.loop = L0Loop(**loop)

    def bind(self, plant: Plant) -> None:
        self.plant = plant
        self._set_point: float | None = None if plant.kind == "penalty" else plant.initial
        self.loop.bind(plant, plant.initial)
        self._wait_strength = max(self.loop.lowest, WAITING * plant.initial)
        self.strength = self.loop.strength
        if plant.kind == "penalty":
            self._rest()
        self._value: float | None = None
        self._wanted: float | None = self.target if self.quality in ("fvu", "ce") else None
        self._answer: float | None = None
        self._seek = Seek()
        self._moved_at = 0
        self._begin: float | None = None  # once the wait is over, it is over under a longer budget, too
        self._best: float | None = None
        self._said = False

    def update(self, measured: Measured | None, samples: int) -> float:
        if measured is None or not measured.tells:
            return self.strength
        ends = self._begin is None and samples >= self.wait * self.plant.total_samples
        if ends:
            self._begin = self.wait * self.plant.total_samples
        waiting = self._begin is None
        if self.quality == "fvu" and math.isfinite(measured.fvu):
            keep = keep_of(self.plant.batch, self.loop.lag)
            self._value = average(self._value, measured.fvu, keep)
            # averaged alike, so that the one belongs to the other
            self._answer = average(self._answer, log_l0(measured.l0 * self.loop.ratio), keep)
            self._measured(math.log(max(self._value, 1e-12) / self._target()), self._value, self._answer, samples)
        if self._set_point is None or (waiting and self.plant.kind == "penalty"):
            self._set_point = max(measured.l0, FEWEST)
            self.loop.step(measured, self._set_point, self._set_point)
            self._rest()
        else:
            self.strength = self.loop.step(measured, self._set_point, self._set_point)
        if ends and self.plant.kind == "penalty":
            self.loop.begin()
            self.strength = self.loop.strength
        return self.strength

    def _rest(self) -> None:
        self.loop.put(self._wait_strength)
        self.strength = self.loop.strength

    def observe(self, row: Mapping[str, object], samples: int) -> dict[str, float]:
        if self._set_point is not None:
            self.loop.observe(row, self._set_point)
        figures = [row.get(f"val/{name}") for name in ("ce", "ce_clean", "ce_mean")]
        known = [figure for figure in figures if isinstance(figure, float) and math.isfinite(figure)]
        if self.quality != "fvu" and len(known) == len(figures):
            ce, clean, ablated = known
            if self.quality != "ce":
                self._wanted = clean + self.target * (1.0 if self.quality == "ce_increase" else ablated - clean)
            self._value = ce
            allowed = self._target() - clean
            if self._target() >= ablated:
                self._warn(f"binds nothing: without a single latent it is {ablated:.4g}")
            if allowed <= 0:
                best = ce if self._best is None else min(self._best, ce)
                self._warn(f"lies below the clean model's own {clean:.4g}; the best value seen is {best:.4g}")
            # an increase of 0 or less has no logarithm: it is as good as can be
            violation = math.log(max(ce - clean, 1e-12) / allowed) if allowed > 0 else 1.0
            answer = None if self.loop.l0 is None else log_l0(self.loop.l0)
            self._measured(violation, ce, answer, samples)
        return {}

    def _target(self) -> float:
        assert self._wanted is not None
        return self._wanted

    def _measured(self, violation: float, value: float, answer: float | None, samples: int) -> None:
        """A new measurement: moves the set point by the samples since the last one."""
        total = self.plant.total_samples
        self._best = value if self._best is None else min(self._best, value)
        begin = self.wait * total if self._begin is None else self._begin
        if self._best > self._target() and samples > begin + HOPELESS_AFTER * total and self._as_dense_as_can_be():
            self._warn(f"is not met by any L0 so far; the best value seen is {self._best:.4g}")
        passed = max(0.0, samples - max(self._moved_at, begin))
        self._moved_at = samples
        if self._set_point is None or answer is None or passed == 0.0:
            return
        percent, lag = 0.01 * total, self.loop.lag
        respond = max(RESPOND * total, RESPOND_LAGS * lag, RESPOND_MEASURED * passed)
        gains = SeekGains(respond, self.climb / percent, self.recover / percent, lag)
        before = math.log(self._set_point)
        self._seek, move = seek_step(self._seek, before, answer, violation, passed, gains)
        wanted = clamp(before + clamp(move, -FARTHEST_AT_ONCE, FARTHEST_AT_ONCE), answer - FARTHEST, answer + FARTHEST)
        self._set_point = clamp(math.exp(wanted), lowest_l0(self.plant), self.plant.d_sae)

    def _as_dense_as_can_be(self) -> bool:
        """A penalty that presses as little as while waiting. A k that is as high as it goes, or higher than latents
        fire for."""
        if self.plant.kind == "penalty":
            return self.loop.strength <= self._wait_strength
        if self._set_point is None or self.loop.l0 is None:
            return True
        return self._set_point >= min(ALL * self.plant.high, UNHEEDED * self.loop.l0)

    def _warn(self, why: str) -> None:
        if not self._said and is_first():
            warnings.warn(
                f"controller.target = {self.target:g} ({self.quality}), here {self._target():.4g}, {why}", stacklevel=1
            )
        self._said = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seek": as_lists(self._seek)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        drift, response = as_tuples(state["seek"])
        self._seek = Seek(drift, GainEstimate(*response))

    def readings(self) -> dict[str, float]:
        readings = super().readings()
        if self._value is not None and self._wanted is not None:
            readings |= {"quality": self._value, "quality_target": self._wanted}
        return readings
