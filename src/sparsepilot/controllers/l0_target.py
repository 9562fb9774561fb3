"""Closed loop: L0 follows a trajectory to the target that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Unpack

from pydantic import Field, PositiveFloat

from sparsepilot.controllers.base import Measured, Plant
from sparsepilot.controllers.closed_loop import ClosedLoop
from sparsepilot.controllers.l0_loop import L0Loop, LoopSettings, lowest_l0
from sparsepilot.controllers.trajectory import (
    REFERENCE,
    Breakpoints,
    check_breakpoints,
    glide,
    refuse_too_steep,
    set_point,
)
from sparsepilot.errors import ConfigError

DEFAULT_L0 = 32.0
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
        refuse_too_steep(field, breakpoints, plant)
        self._set_point = self._begins_at(breakpoints)
        self.loop.bind(plant, self._set_point)
        self.strength = self.loop.strength

    def _begins_at(self, breakpoints: Breakpoints) -> float:
        follows = self._given is None and self.plant.kind == "penalty"
        return float(self.plant.d_sae) if follows else set_point(breakpoints, 0.0)

    def planned(self, samples: int, total_samples: int) -> float | None:
        return None if self._given is None else set_point(self._given, samples / total_samples)

    def update(self, measured: Measured | None, samples: int) -> float:
        if measured is not None and measured.tells:
            was = self._set_point
            if self._given is None and self.plant.kind == "penalty" and self.loop.l0 is None:
                was = max(measured.l0, self._target)  # the run starts here
            self._set_point = self._next(was, measured, samples)
            self.strength = self.loop.step(measured, was, self._set_point)
        return self.strength

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
