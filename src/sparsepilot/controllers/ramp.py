"""Open loop: the knob waits, goes from one value to another, and holds."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from sparsepilot.controllers.base import KNOB_FIELDS, Controller, Measured, Plant, refuse_part_of_a_latent
from sparsepilot.controllers.laws import clamp
from sparsepilot.errors import ConfigError


class Ramp(Controller):
    """From `start` to `end` over a part of the run; constant before and after.

    What papers do to let a dictionary form before the penalty presses.

    Args:
        start: the knob's value at first.
        end: its value in the end; None: the model's own.
        shape: `linear`, `cosine` (half a wave, flat at both ends) or `log` (linear in the logarithm).
        begin: share of the budget after which it moves.
        until: share of the budget at which it has arrived.
        wait_samples: the samples after which it moves, instead of `begin`.
        ramp_samples: the samples that it then takes, instead of `until`.

    >>> def values(**settings):
    ...     ramp = Ramp(**settings)
    ...     ramp.bind(Plant("penalty", initial=4.0, low=0, high=1e8, d_sae=64, batch=1, total_samples=1000))
    ...     return [round(ramp.update(None, samples), 3) for samples in (0, 250, 500, 1000)]
    >>> values(until=0.5), values(until=0.5, shape="cosine")
    ([0.0, 2.0, 4.0, 4.0], [0.0, 2.0, 4.0, 4.0])
    >>> values(start=0.04, shape="log", wait_samples=100, ramp_samples=300)
    [0.04, 0.4, 4.0, 4.0]
    """

    def __init__(
        self,
        start: NonNegativeFloat = 0.0,
        end: NonNegativeFloat | None = None,
        shape: Literal["linear", "cosine", "log"] = "linear",
        begin: Annotated[float, Field(ge=0, le=1)] = 0.0,
        until: Annotated[float, Field(gt=0, le=1)] = 0.25,
        wait_samples: NonNegativeInt | None = None,
        ramp_samples: PositiveInt | None = None,
    ) -> None:
        if wait_samples is None and ramp_samples is None and begin >= until:
            raise ConfigError(f"controller.begin = {begin}: must lie before controller.until = {until}")
        if shape == "log" and start <= 0:
            raise ConfigError(f"controller.start = {start:g}: a ramp of shape=log must start above 0")
        self.start, self._wanted, self.shape, self.begin, self.until = start, end, shape, begin, until
        self.wait_samples, self.ramp_samples = wait_samples, ramp_samples

    def bind(self, plant: Plant) -> None:
        self.end = float(plant.initial if self._wanted is None else self._wanted)
        self.low, self.high = plant.low, plant.high
        self.total_samples = plant.total_samples
        begins, ends = self._span(plant.total_samples)
        if begins >= ends:
            raise ConfigError(
                f"controller.wait_samples = {self.wait_samples}: the ramp would begin at {begins:,.0f} samples and "
                f"end at {ends:,.0f}; set controller.ramp_samples, too"
            )
        if begins >= plant.total_samples:
            field = "begin" if self.wait_samples is None else "wait_samples"
            raise ConfigError(
                f"controller.{field} = {getattr(self, field):g}: the ramp would begin after the end of the run's "
                f"{plant.total_samples:,} samples"
            )
        if not plant.low <= self.end <= plant.high:
            field = KNOB_FIELDS[plant.kind] if self._wanted is None else "controller.end"
            raise ConfigError(
                f"{field} = {self.end:g}: this model's {plant.kind} lies between {plant.low:g} and {plant.high:g}"
            )
        refuse_part_of_a_latent("controller.end", self.end, plant)
        if self.shape == "log" and self.end <= 0:
            raise ConfigError(f"controller.end = {self.end:g}: a ramp of shape=log must end above 0")
        if self.start > plant.high:
            raise ConfigError(f"controller.start = {self.start:g}: this model's {plant.kind} is at most {plant.high:g}")
        self.strength = self.planned(0, self.total_samples)

    def update(self, measured: Measured | None, samples: int) -> float:
        self.strength = self.planned(samples, self.total_samples)
        return self.strength

    def _span(self, total_samples: int) -> tuple[float, float]:
        """Where it begins and where it has arrived, in samples."""
        begins = self.begin * total_samples if self.wait_samples is None else self.wait_samples
        return begins, self.until * total_samples if self.ramp_samples is None else begins + self.ramp_samples

    def planned(self, samples: int, total_samples: int) -> float:
        begins, ends = self._span(total_samples)
        done = clamp((samples - begins) / (ends - begins), 0.0, 1.0)
        if self.shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        if self.shape == "log":
            return clamp(self.start * (self.end / self.start) ** done, self.low, self.high)
        return clamp(self.start + (self.end - self.start) * done, self.low, self.high)
