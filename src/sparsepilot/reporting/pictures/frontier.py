"""What sparsity costs: L0 against unexplained variance and against cross-entropy."""

from __future__ import annotations

from sparsepilot.reporting.figure import Line, Panel, Picture, axis
from sparsepilot.reporting.runs import Run

PLACE = 6


def draw(run: Run) -> Picture:
    """The points of a `pareto` run, joined; the end of any run, as a dot."""
    panels = [_panel(run, "fvu", "FVU"), _panel(run, "ce", "validation cross-entropy (nats)")]
    return Picture("frontier", "Frontier", panels)


def _panel(run: Run, quality: str, label: str) -> Panel:
    key = f"frontier/{quality}"
    points = sorted((row["frontier/l0"], row[key]) for row in run.rows if row.get(key) is not None)
    lines = []
    if points:
        lines.append(Line("held", "measured", [p[0] for p in points], [p[1] for p in points], kind="joined_points"))
    l0, value = run.last("val/l0"), run.last(f"val/{quality}")
    if l0 is not None and value is not None:
        lines.append(Line("end of the run", "validation", [l0], [value], kind="points"))
    x = [v for one in lines for v in one.x]
    y = [v for one in lines for v in one.y]
    missing = None
    if not lines:
        missing = f"no val/{quality} in the rows: it comes with the first validation"
    notes = [] if points or missing else ["controller=pareto draws a frontier"]
    return Panel(
        "FVU" if quality == "fvu" else "Cross-entropy",
        axis("L0 (active latents per row)", x, log=True, pad=0.08),
        axis(label, y, pad=0.1),
        lines,
        notes=notes,
        missing=missing,
        optional=quality == "ce",
    )
