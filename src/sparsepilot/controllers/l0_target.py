"""Closed loop: L0 follows a trajectory to the target that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Unpack

from pydantic import Field, PositiveFloat

from sparsepilot.controllers.base import Controller, Measured, Plant
from sparsepilot.controllers.l0_loop import FEWEST, L0Loop, LoopSettings
from sparsepilot.controllers.trajectory import REFERENCE, check_breakpoints, refuse_too_steep, set_point
from sparsepilot.errors import ConfigError

DEFAULT_L0 = 32.0


class L0Target(Controller):
    """Holds the L0 of held-out rows on a trajectory that ends at `target_l0` (`L0Loop` says how).

    Args:
        target_l0: what the run is to end at; None: a k model's own k, 32 for others.
        trajectory: [share of the budget, L0] breakpoints, joined log-linearly; `reference`: those of the reference
            run; None: from where the run starts to the target at `reach` (a k: at the target throughout).
        reach: share of the budget at which the target is reached.
        loop: settings of the inner loop.
    """

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
        self._given: Sequence[Sequence[float]] | None = given
        self.loop = L0Loop(**loop)

    def bind(self, plant: Plant) -> None:
        self.plant = plant
        if self.target_l0 is None:
            self.target_l0 = plant.initial if plant.kind == "k" else DEFAULT_L0
        self._start_l0: float | None = None
        self.loop.bind(plant, self.set_point(0))
        self.strength = self.loop.strength
        field = "controller.target_l0" if self._given is None else "controller.trajectory"
        check_breakpoints(field, self._breakpoints(), self.loop.lowest_l0, plant.d_sae)
        refuse_too_steep(field, self._breakpoints(), plant)

    def set_point(self, samples: int) -> float:
        """L0 that held-out rows are to have at the clock `samples`."""
        return set_point(self._breakpoints(), samples / self.plant.total_samples)

    def _breakpoints(self) -> Sequence[Sequence[float]]:
        if self._given is not None:
            return self._given
        assert self.target_l0 is not None
        if self.plant.kind == "k":
            return [(0.0, self.target_l0)]
        start_l0 = self.plant.d_sae / 2 if self._start_l0 is None else self._start_l0
        return [(0.0, max(start_l0, self.target_l0)), (self.reach, self.target_l0)]

    def update(self, measured: Measured | None, samples: int) -> float:
        if measured is not None:
            if self._start_l0 is None:
                self._start_l0 = max(measured.l0, FEWEST)
            # the measurement is of the step before the one just taken
            was = self.set_point(samples - self.plant.batch)
            self.strength = self.loop.step(measured, was, self.set_point(samples))
        return self.strength

    def observe(self, row: Mapping[str, object], samples: int) -> None:
        self.loop.observe(row, self.set_point(samples))

    def readings(self) -> dict[str, float]:
        return self.loop.readings()

    def state_dict(self) -> dict[str, float | None]:
        return {"strength": self.strength, "start_l0": self._start_l0, **self.loop.state_dict()}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.loop.load_state_dict(state)
        self.strength = self.loop.strength
        self._start_l0 = state["start_l0"]
