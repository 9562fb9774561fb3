"""The raw training loss over optimizer steps and tokens."""

from __future__ import annotations

from sparsepilot.reporting.build import absent, line
from sparsepilot.reporting.figure import Axis, Panel, Picture, axis
from sparsepilot.reporting.runs import Run

PLACE = 2


def draw(run: Run) -> Picture:
    """Optimizer steps below and tokens above, aligned, both log with ticks 10^n; raw loss, linear."""
    loss = line(run, "training loss", "measured", "step", "train/loss", log_x=True)
    last_step = max(10.0, *loss.x) if loss.x else 10.0
    tokens_per_step = (run.last("tokens") or run.batch) / (run.last("step") or 1)
    below = Axis("optimizer step", 1.0, last_step, log=True, text="power")
    above = Axis("tokens", tokens_per_step, last_step * tokens_per_step, log=True, text="power")
    return Picture(
        "loss",
        "Loss over training",
        [
            Panel(
                "",
                below,
                axis("training loss", [0.0, *loss.y], low=min(0.0, *loss.y) if loss.y else 0.0),
                [loss] if loss.x else [],
                top=above,
                top_per_x=tokens_per_step,
                missing=absent(run, "train/loss"),
            )
        ],
    )
