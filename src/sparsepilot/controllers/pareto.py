"""Closed loop: a frontier from one run instead of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Unpack

from pydantic import Field, PositiveFloat

from sparsepilot.controllers.base import Measured, Plant, refuse_part_of_a_latent
from sparsepilot.controllers.closed_loop import ClosedLoop
from sparsepilot.controllers.knob import lowest_l0
from sparsepilot.controllers.l0_loop import L0Loop, LoopSettings
from sparsepilot.controllers.laws import average, keep_of
from sparsepilot.controllers.trajectory import Breakpoints, check_breakpoints, glide, refuse_too_steep
from sparsepilot.errors import ConfigError

SETTLED = 0.02
"""Largest error, averaged over `SETTLED_OVER` lags, at which a point counts as reached; it must last as long again."""
SETTLED_OVER = 5.0


class Pareto(ClosedLoop):
    """Steps the set point through a list of L0 values and records (L0, FVU, cross-entropy) of held-out rows at each.

    What is left of the budget is shared out evenly among the values that are left. Of its share a value spends `travel`
    on the way there and is then held until it has settled, and at least until `hold` of the share is over; a validation
    is asked for and recorded as `frontier/...`. One that does not settle in its share is recorded with
    `frontier/settled` 0. The last one is held to the end.

    Args:
        targets: L0 values, descending.
        travel: of each share.
        hold: share of each share after which a settled value is left.
        loop: settings of the inner loop.
    """

    needs_held_out = True
    own_state = ("strength", "_at", "_since", "_settled_since", "_asked", "_set_point", "_mean_error")

    def __init__(
        self,
        targets: list[PositiveFloat],
        travel: Annotated[float, Field(gt=0, lt=1)] = 0.4,
        hold: Annotated[float, Field(gt=0, le=1)] = 1.0,
        **loop: Unpack[LoopSettings],
    ) -> None:
        if len(targets) < 2 or sorted(set(targets), reverse=True) != list(targets):
            raise ConfigError(f"controller.targets = {list(targets)}: two or more descending L0 values are needed")
        self.targets, self.travel, self.hold = [float(t) for t in targets], travel, hold
        self.loop = L0Loop(**loop)

    def bind(self, plant: Plant) -> None:
        self.plant = plant
        self._at, self._since, self._settled_since = 0, 0, -1
        self._asked = False
        self._set_point: float | None = self.targets[0] if plant.kind == "k" else None
        self._mean_error: float | None = None
        for target in self.targets:
            check_breakpoints("controller.targets", [(0.0, target)], lowest_l0(plant), plant.d_sae)
            refuse_part_of_a_latent("controller.targets", target, plant)
        self.loop.bind(plant, self.targets[0])
        refuse_too_steep("controller.targets", self._ways(), plant)
        self.strength = self.loop.strength

    def notes(self) -> list[str]:
        plant, least = self.plant, 2 * SETTLED_OVER * self.loop.lag
        held = (1 - self.travel) * plant.total_samples / len(self.targets)
        if held >= least:
            return []
        return [
            f"controller.targets: each is held for {held / plant.batch:.0f} steps; to be told from one that does not "
            f"settle it needs about {least / plant.batch:.0f}: give more samples or a smaller batch"
        ]

    def _ways(self) -> Breakpoints:
        """From each value, where its share of the budget ends, to the next one; how the first is reached hangs on where
        the run starts."""
        share = 1 / len(self.targets)
        return [
            point
            for i, (before, target) in enumerate(pairwise(self.targets), start=1)
            for point in ((i * share, before), ((i + self.travel) * share, target))
        ]

    @property
    def _last(self) -> bool:
        return self._at == len(self.targets) - 1

    def _share(self) -> float:
        """Samples that the present value may take."""
        return (self.plant.total_samples - self._since) / (len(self.targets) - self._at)

    def update(self, measured: Measured | None, samples: int) -> float:
        if measured is None or not measured.tells:
            return self.strength
        plant, target = self.plant, self.targets[self._at]
        was = max(measured.l0, target) if self._set_point is None else self._set_point
        left = self._since + self.travel * self._share() - samples
        self._set_point = glide(was, math.inf, target, plant.batch, left, 0.0)
        self.strength = self.loop.step(measured, was, self._set_point)
        keep = keep_of(plant.batch, SETTLED_OVER * self.loop.lag)
        self._mean_error = average(self._mean_error, self.loop.error, keep)
        if self._set_point > target or abs(self._mean_error) > SETTLED:
            self._settled_since = -1
        elif self._settled_since < 0:
            self._settled_since = samples
        return self.strength

    def _is_settled(self, samples: int) -> bool:
        return self._settled_since >= 0 and samples - self._settled_since >= SETTLED_OVER * self.loop.lag

    def wants_validation(self, samples: int) -> bool:
        if self._last or self._set_point is None:
            return False
        spent = (samples - self._since) / self._share()
        self._asked = spent >= 1 or (spent >= self.hold and self._is_settled(samples))
        return self._asked

    def observe(self, row: Mapping[str, object], samples: int) -> dict[str, float]:
        if self._set_point is not None:
            self.loop.observe(row, self._set_point)
        ends = samples >= self.plant.total_samples
        if "val/l0" not in row or not (self._asked or (self._last and ends)):
            return {}
        found = {"frontier/target": self.targets[self._at], "frontier/settled": float(self._is_settled(samples))}
        for name in ("l0", "fvu", "ce"):
            value = row.get(f"val/{name}")
            if isinstance(value, float):
                found[f"frontier/{name}"] = value
        if not self._last:
            self._at, self._since, self._settled_since, self._asked = self._at + 1, samples, -1, False
        return found
