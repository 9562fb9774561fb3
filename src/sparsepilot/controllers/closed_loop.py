"""What the closed-loop controllers share: they own a set point, and hand it down to the inner loop."""

from __future__ import annotations

from typing import Any

from sparsepilot.controllers.base import Controller
from sparsepilot.controllers.l0_loop import L0Loop


class ClosedLoop(Controller):
    """A controller whose knob is turned by `loop`."""

    loop: L0Loop
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
