"""train.py with one number left out of what a checkpoint saves: the campaign must notice.

    PLANTED_BUG=last-fired python benchmarks/killing/planted_bug.py <what train.py takes>

The patches are here, and nothing in src/ knows of them.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from killing.targets import SteppedK
from sparsepilot.metrics.dead import DeadLatents
from sparsepilot.training.trainee import Trainee


def forget_state(owner: type, name: str, state: str, key: str) -> None:
    """Wraps the method `name` of `owner`, which returns a state, so that `key` is missing (or None) in it."""
    original: Callable[..., dict[str, Any]] = getattr(owner, name)

    def without(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        saved = original(self, *args, **kwargs)
        if state == "absent":
            saved.pop(kwargs.get("prefix", "") + key, None)
        else:
            saved[key] = None
        return saved

    setattr(owner, name, without)


BUGS: dict[str, Callable[[], None]] = {
    # when each latent last fired: dead latents are counted from 0 again
    "last-fired": lambda: forget_state(DeadLatents, "state_dict", "absent", "last_fired_F"),
    # the clock that dead latents are measured against
    "dead-clock": lambda: forget_state(DeadLatents, "state_dict", "absent", "samples"),
    # the L0 that the controller has not seen yet
    "pending-l0": lambda: forget_state(Trainee, "get_extra_state", "none", "pending_step"),
    # what the controller has added up
    "controller": lambda: forget_state(SteppedK, "state_dict", "absent", "total"),
}

if __name__ == "__main__":
    BUGS[os.environ["PLANTED_BUG"]]()
    script = Path(__file__).resolve().parents[2] / "train.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
