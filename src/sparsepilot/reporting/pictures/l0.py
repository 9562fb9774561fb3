"""L0 over training, the controller's set point beside the measurement."""

from __future__ import annotations

from sparsepilot.reporting.build import line, over_millions, undrawable, zeros
from sparsepilot.reporting.figure import Panel, Picture, axis
from sparsepilot.reporting.runs import Run

PLACE = 1


def draw(run: Run) -> Picture:
    """L0 (log10) over samples in millions, linear, from 0 to the budget."""
    lines = [
        line(run, "training batch", "measured", "samples_M", "train/l0", positive=True),
        line(run, "set point", "set_point", "samples_M", "controller/target", positive=True),
        line(run, "validation", "validation", "samples_M", "val/l0", kind="points", positive=True),
    ]
    values = [v for one in lines for v in one.y]
    notes = zeros(run, "L0", "train/l0", "val/l0")
    return Picture(
        "l0",
        "L0 over training",
        [
            Panel(
                "",
                over_millions(run),
                axis("L0 (active latents per row)", values, log=True),
                [one for one in lines if one.x],
                notes=notes if values else (),
                missing=None if run.has("train/l0") and values else undrawable(run, "train/l0", notes),
            )
        ],
    )
