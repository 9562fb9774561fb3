"""Closed loop: L0 follows a trajectory to the target that the user names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal, Unpack

from pydantic import Field, PositiveFloat

from sparsepilot.controllers.base import Measured, Plant, refuse_part_of_a_latent
from sparsepilot.controllers.closed_loop import ClosedLoop
from sparsepilot.controllers.knob import lowest_l0
from sparsepilot.controllers.l0_loop import L0Loop, LoopSettings
from sparsepilot.controllers.laws import clamp
from sparsepilot.controllers.trajectory import (
    REFERENCE,
    Breakpoints,
    check_breakpoints,
    glide,
    refuse_too_steep,
    set_point,
    steepest,
)
from sparsepilot.errors import ConfigError

DEFAULT_L0 = 32.0
STARTS_AT = 0.5
"""L0 at the start as a share of the latents, where pre-activations have either sign."""
FALLS_PER_LAG = 0.2
"""Nats by which L0 follows a set point in a lag of the loop. The reference trajectory's first fall has 0.05 in a run of
50M samples, which is 0.3% off after it, and 0.3 in one of 8M, which is 160% off (docs/dynamics.md)."""
GRACE_LAGS = 2.0
"""Lags that the way to the first breakpoint may lack: it begins at `STARTS_AT`, about."""
SETTLED_AFTER = 60
"""Lags from the arrival of the set point on in which L0 has come within 5% for good on all plants that the tests
simulate, and in all cells of the grid. In half of them JumpReLU ended 4.5% off on the demo."""
FOLLOWED_PER_LAG = 0.6
"""Nats by which the set point goes down, in a lag of the loop, with an L0 that falls by itself."""


class L0Target(ClosedLoop):
    """Holds the L0 of held-out rows on a trajectory that ends at `target_l0` (`L0Loop` says how).

    Args:
        target_l0: what the run is to end at; None: a k model's own k, 32 for others.
        trajectory: [share of the budget, L0] breakpoints, joined log-linearly; `reference`: those of the reference
            run; None: from where the run starts to the target at `reach`, ever lower where L0 falls by itself (a k: at
            the target throughout).
        reach: share of the budget at which the target is reached.
        loop: settings of the inner loop.
    """

    own_state = ("strength", "_set_point")

    def __init__(
        self,
        target_l0: PositiveFloat | None = None,
        trajectory: Literal["reference"] | list[list[float]] | None = None,
        reach: Annotated[float, Field(gt=0, le=1)] = 0.2,
        **loop: Unpack[LoopSettings],
    ) -> None:
        if target_l0 is not None and trajectory is not None:
            raise ConfigError(
                f"controller.target_l0 = {target_l0:g}: controller.trajectory says where the run ends; give one of them"
            )
        self.target_l0, self.reach = target_l0, reach
        given = REFERENCE if trajectory == "reference" else trajectory
        self._given: Breakpoints | None = given
        self.loop = L0Loop(**loop)

    def bind(self, plant: Plant) -> None:
        self.plant = plant
        self._target = self.target_l0 or (plant.initial if plant.kind == "k" else DEFAULT_L0)
        field, breakpoints = "controller.trajectory", self._given
        if breakpoints is None:
            field, breakpoints = "controller.target_l0", [(self.reach, self._target)]
        check_breakpoints(field, breakpoints, lowest_l0(plant), plant.d_sae)
        refuse_part_of_a_latent(field, breakpoints[-1][1], plant)
        refuse_too_steep(field, breakpoints, plant)
        self._set_point = self._begins_at(breakpoints)
        self.loop.bind(plant, self._set_point)
        self.strength = self.loop.strength

    def _begins_at(self, breakpoints: Breakpoints) -> float:
        follows = self._given is None and self.plant.kind == "penalty"
        return float(self.plant.d_sae) if follows else set_point(breakpoints, 0.0)

    def notes(self) -> list[str]:
        """Whether L0 will be late: on a given trajectory, where it is to fall by more than the loop follows, and on the
        default one, whose start is known once the run has begun. Whether there is time to settle, too."""
        if self.plant.kind == "k":
            return []
        return self._hurries(self._given) if self._given is not None else [*self._late(), *self._short()]

    def _late(self) -> list[str]:
        """Of the default trajectory: where thresholds cannot fall as fast."""
        plant, start = self.plant, STARTS_AT * self.plant.d_sae
        can_fall = max(1e-12, steepest(plant, 0.0, self.reach) * plant.batch)  # a learning rate may still be 0 there
        steps = math.log(max(1.0, start / self._target)) / can_fall
        there = self.reach * plant.total_samples / plant.batch
        if steps <= there:
            return []
        return [
            f"controller.reach = {self.reach:g}: from {start:,.0f} latents, where runs about start, to "
            f"{self._target:g} takes some {steps:.0f} steps, as L0 can fall by at most {can_fall:.2g} nats per step "
            f"with this learning rate, whatever the batch; until there are {there:.0f}: give more samples or a smaller "
            "batch"
        ]

    def _short(self) -> list[str]:
        """Of the default trajectory: of a given one nobody knows where it is to be at rest."""
        samples = (1 - self.reach) * self.plant.total_samples
        wanted = round(SETTLED_AFTER * self.loop.lag_steps)
        there = samples / self.plant.batch
        if there >= wanted:
            return []
        return [
            f"controller.target_l0 = {self._target:g}: it is to be reached {there:.0f} steps before the end, and to "
            f"rest there it may take {wanted:,}: the run may end some percent off; give more samples or a smaller "
            f"batch ({max(1, int(samples / wanted)):,} at most)"
        ]

    def _hurries(self, given: Breakpoints) -> list[str]:
        """Of the way to the first breakpoint, too."""
        lags, start = self.plant.total_samples / self.loop.lag, STARTS_AT * self.plant.d_sae
        found = []
        grace = GRACE_LAGS
        for (begin, l0_begin), (end, l0_end) in pairwise([(0.0, max(start, given[0][1])), *given]):
            there, needed = (end - begin) * lags, math.log(l0_begin / l0_end) / FALLS_PER_LAG
            if needed > there + grace:
                found.append(
                    f"controller.trajectory: L0 is to fall from {l0_begin:,.0f} at {begin:g} of the budget to "
                    f"{l0_end:g} at {end:g}; that takes some {needed * self.loop.lag_steps:.0f} steps, and there are "
                    f"{there * self.loop.lag_steps:.0f}: it will be late; give more samples, a smaller batch or a "
                    "flatter fall"
                )
            grace = 0.0
        return found

    def planned(self, samples: int, total_samples: int) -> float | None:
        return None if self._given is None else set_point(self._given, samples / total_samples)

    def update(self, measured: Measured | None, samples: int) -> float:
        if measured is not None and measured.tells:
            was = self._set_point
            if self._given is None and self.plant.kind == "penalty" and self.loop.l0 is None:
                was = max(measured.l0, self._target)  # the run starts here
            self._set_point = self._next(was, measured, samples)
            self.strength = self.loop.step(measured, was, self._set_point, self._planned_move(was))
        return self.strength

    def _planned_move(self, was: float) -> float:
        """Of a given trajectory, in nats since the last step; no faster than the loop follows."""
        if self._given is None:
            return 0.0
        most = FALLS_PER_LAG * self.plant.batch / self.loop.lag
        return clamp(math.log(self._set_point / was), -most, most)

    def _next(self, was: float, measured: Measured, samples: int) -> float:
        plant = self.plant
        if self._given is not None:
            return set_point(self._given, samples / plant.total_samples)
        if plant.kind == "k":
            return self._target
        left = self.reach * plant.total_samples - samples
        l0 = self.loop.l0 or measured.l0
        return glide(was, l0, self._target, plant.batch, left, FOLLOWED_PER_LAG / self.loop.lag)

    def observe(self, row: Mapping[str, object], samples: int) -> dict[str, float]:
        self.loop.observe(row, self._set_point)
        return {}
