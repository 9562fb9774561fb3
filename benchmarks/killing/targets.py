"""A controller and a schedule for runs that get killed: both hang on saved state, and both can be killed in.

The repository's `constant` controller and schedule would hide a measurement or a clock that was lost on resume.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from sparsepilot import faults, schedules
from sparsepilot.controllers.base import Controller, Measured, Plant


class SteppedK(Controller):
    """k = 3 + floor(sum of all measured L0) mod 4: one lost measurement changes k for the rest of the run.

    `strength` is there because the command line replaces the class of conf/controller/constant.yaml, and is not used.
    """

    def __init__(self, strength: float | None = None) -> None:
        self.total = 0.0

    def bind(self, plant: Plant) -> None:
        self.strength = float(plant.initial)

    def update(self, measured: Measured | None, samples: int) -> float:
        faults.point("mid-step-controller")  # the parameters and the clock have moved, the step's sums are still there
        if measured is not None:
            self.total += measured.l0
            self.strength = float(3 + int(self.total) % 4)
        return self.strength

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        faults.point("resume-state")  # some of the checkpoint's tensors are copied, some are not
        self.strength, self.total = state["strength"], state.get("total", 0.0)


def cosine(samples: int, total_samples: int, lr: float, warmup_samples: int = 0) -> float:
    """`schedules.cosine`; asked once per optimizer step, after all its micro-batches but the last.

    `KILLING_SIGNAL=SIGTERM:20480` sends this process a signal in the step that begins at so many samples
    (`...@1`: only where it is rank 1);
    `KILLING_SLOW=0.2:<path>` takes so many seconds longer for every step as long as there is a file at the path.
    """
    faults.point("step-start")
    slow_s, _, file = os.environ.get("KILLING_SLOW", "").partition(":")
    if slow_s and os.path.exists(file):
        time.sleep(float(slow_s))
    wanted, _, rank = os.environ.get("KILLING_SIGNAL", "").partition("@")
    name, _, at_samples = wanted.partition(":")
    if name and samples == int(at_samples) and rank in ("", os.environ.get("RANK")):
        os.kill(os.getpid(), signal.Signals[name])
    return schedules.cosine(samples, total_samples, lr, warmup_samples)
