"""What the closed-loop controllers share: they own a set point, and hand it down to the inner loop."""

from __future__ import annotations

import warnings
from typing import Any

from sparsepilot.controllers.base import Controller
from sparsepilot.controllers.l0_loop import L0Loop
from sparsepilot.errors import ConfigError
from sparsepilot.ranks import is_first


class ClosedLoop(Controller):
    """A controller whose knob is turned by `loop`."""

    loop: L0Loop
    needs_held_out = False
    """Whether it moves at validations only; the others hold the L0 of training where there are none."""
    own_state: tuple[str, ...]
    """Names of the attributes that a resumed run needs beside the loop's."""

    def disturb(self, factor: float) -> None:
        self.loop.disturb(factor)
        self.strength = self.loop.strength

    def readings(self) -> dict[str, float]:
        return self.loop.readings()

    def state_dict(self) -> dict[str, Any]:
        return {"loop": self.loop.state_dict(), **{name: getattr(self, name) for name in self.own_state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loop.load_state_dict(state["loop"])
        for name in self.own_state:
            setattr(self, name, state[name])


def refuse_without_held_out(controller: Controller, num_val_rows: int) -> None:
    """Refuses a controller that acts at validations where there is nothing to validate on; of one that can do without
    it says so.

    Raises:
        ConfigError: naming the controller and what would be right.
    """
    if num_val_rows > 0 or not isinstance(controller, ClosedLoop):
        return
    if controller.needs_held_out:
        raise ConfigError(
            "controller = pareto: goes from value to value at validations, and this data has no validation rows; use "
            "data with some (data.build.num_val_rows, val_fraction), or controller=l0_target"
        )
    if is_first():
        warnings.warn(
            "controller: this data has no validation rows; the L0 that is held is that of training", stacklevel=1
        )
