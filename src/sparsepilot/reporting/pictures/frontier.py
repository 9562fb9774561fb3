"""What sparsity costs: L0 against unexplained variance and against cross-entropy."""

from __future__ import annotations

from sparsepilot.reporting.figure import Line, Panel, Picture, axis
from sparsepilot.reporting.runs import Run, finite

PLACE = 6


def draw(run: Run) -> Picture:
    """The points of a `pareto` run, those that settled joined; the last validation of any run, as a dot."""
    panels = [_panel(run, "fvu", "FVU"), _panel(run, "ce", "validation cross-entropy (nats)")]
    return Picture("frontier", "Frontier", panels)


def _panel(run: Run, quality: str, label: str) -> Panel:
    held, unsettled = _points(run, quality, settled=True), _points(run, quality, settled=False)
    lines = []
    if held:
        lines.append(Line("held", "measured", [p[0] for p in held], [p[1] for p in held], kind="joined_points"))
    if unsettled:
        x, y = [p[0] for p in unsettled], [p[1] for p in unsettled]
        lines.append(Line("not settled", "unsettled", x, y, kind="points"))
    last = run.last_of("val/l0", f"val/{quality}")
    if last:
        lines.append(Line("last validation", "validation", [last[0]], [last[1]], kind="points"))
    x = [v for one in lines for v in one.x]
    y = [v for one in lines for v in one.y]
    missing = None
    if not lines:
        missing = f"no val/{quality} in the rows: it comes with the first validation"
    notes = [] if held or unsettled or missing else ["controller=pareto draws a frontier"]
    if unsettled:
        notes.append(f"{len(unsettled)} not settled")
    return Panel(
        "FVU" if quality == "fvu" else "Cross-entropy",
        axis("L0 (active latents per row)", x, log=True, pad=0.08),
        axis(label, y, pad=0.1),
        lines,
        notes=notes,
        missing=missing,
        optional=quality == "ce",
    )


def _points(run: Run, quality: str, settled: bool) -> list[tuple[float, float]]:
    """(L0, quality) of the values that a controller was to hold, by whether its loop came to rest there. The last value
    is recorded at the end of each budget that the run has had: the latest counts."""
    rows = [row for row in run.rows if finite(row.get("frontier/l0")) and finite(row.get(f"frontier/{quality}"))]
    latest = {row["frontier/target"]: row for row in rows}.values()
    kept = [row for row in latest if bool(row["frontier/settled"]) == settled]
    return sorted((row["frontier/l0"], row[f"frontier/{quality}"]) for row in kept)
