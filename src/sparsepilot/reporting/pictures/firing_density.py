"""How often latents fire."""

from __future__ import annotations

from sparsepilot.metrics.firing import LOG10_EDGES
from sparsepilot.reporting.figure import Axis, Line, Panel, Picture, axis
from sparsepilot.reporting.runs import Run

PLACE = 7
KEY = "val/firing_density_histogram"


def draw(run: Run) -> Picture:
    """Latents per bin of firing density (log), on the last validation's rows."""
    counts = run.last(KEY)
    lines, notes = [], []
    if counts is not None:
        edges = [10.0**edge for edge in LOG10_EDGES]
        lines = [Line("last validation", "density", edges, [*map(float, counts), float(counts[-1])], kind="steps")]
        notes = [f"{run.d_sae - sum(counts):,} latents never fired there"]
    return Picture(
        "firing_density",
        "Firing density",
        [
            Panel(
                "",
                Axis(
                    "firing density (share of validation rows)",
                    10.0 ** LOG10_EDGES[0],
                    10.0 ** LOG10_EDGES[-1],
                    log=True,
                    text="power",
                ),
                axis("latents", [0.0, *(counts or [])], low=0.0),
                lines,
                notes=notes,
                missing=None if lines else f"no {KEY} in the rows: it comes with the first validation",
            )
        ],
    )
