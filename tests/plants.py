"""Simulated plants for controllers: how L0 answers a penalty's strength, in nats, one optimizer step at a time."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field

from sparsepilot.controllers.base import Controller, Measured, Plant

BATCH = 256
D_SAE = 4096
DENSE = 1500.0
"""L0 at a strength that presses nothing"""


@dataclass
class Simulated:
    """ln L0 falls by `gain` nats per nat of ln(strength), and lags.

        y_eq = clamp(ln(target) - gain * (u - ln(right)) + drift * n, floor, ceiling)
        y' = clip((y_eq - y) / lag, -slew, slew)

    `u` is ln(strength) `dead_time` steps ago; what is measured has independent noise.
    """

    target: float = 32.0
    right: float = 0.1
    """the strength that holds L0 at `target`"""
    gain: float = 1.0
    lag: float = 10.0
    """steps"""
    dead_time: int = 0
    """steps"""
    slew: float = math.inf
    """most nats per step"""
    floor: float = math.log(0.02)
    ceiling: float = math.log(DENSE)
    drift: float = 0.0
    """nats of ln L0 per step at a constant strength"""
    noise: float = 0.0
    """standard deviation of one measurement, relative"""
    seed: int = 0
    y: float = math.log(DENSE)
    steps: int = 0
    coherence: float = 0.0
    _late: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def step(self, strength: float) -> Measured:
        """One optimizer step under a strength."""
        self._late.append(math.log(max(strength, 1e-30)))
        u = self._late.popleft() if len(self._late) > self.dead_time else self._late[0]
        wanted = math.log(self.target) - self.gain * (u - math.log(self.right)) + self.drift * self.steps
        move = (min(self.ceiling, max(self.floor, wanted)) - self.y) / self.lag
        limited = min(self.slew, max(-self.slew, move))
        self.coherence = max(-1.0, min(1.0, -move / self.slew)) if math.isfinite(self.slew) else 0.0
        self.y += limited
        self.steps += 1
        noisy = math.exp(self.y) * (1 + self.noise * self._random.gauss(0, 1))
        return Measured(noisy, fvu=math.exp(-0.5 * self.y), coherence=self.coherence)


def penalty(initial: float, total_steps: int, **changes: object) -> Plant:
    """What a controller is told of a simulated plant."""
    values = {
        "kind": "penalty", "initial": initial, "low": 0.0, "high": math.inf, "d_sae": D_SAE, "batch": BATCH,
        "total_samples": total_steps * BATCH,
    }  # fmt: skip
    return Plant(**(values | changes))  # type: ignore[arg-type]


def drive(controller: Controller, plant: Simulated, num_steps: int, first: int = 0) -> list[float]:
    """True L0 after each step; the controller hears of a step one step later, as in training."""
    found, pending = [], None
    for n in range(first, first + num_steps):
        measured = plant.step(controller.strength)
        found.append(math.exp(plant.y))
        controller.update(pending, (n + 1) * BATCH)
        pending = measured
    return found
