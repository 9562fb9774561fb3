"""What sparsity costs: L0 against unexplained variance and against cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sparsepilot.reporting.build import not_drawn
from sparsepilot.reporting.figure import Line, Panel, Picture, Role, axis
from sparsepilot.reporting.runs import Run, finite

PLACE = 6
_LOOK: dict[str, tuple[Role, Literal["points", "joined_points"]]] = {
    "held": ("measured", "joined_points"),
    "not settled": ("unsettled", "points"),
    "last validation": ("validation", "points"),
}


def draw(run: Run) -> Picture:
    """The points of a `pareto` run, those that settled joined; the last validation of any run, as a dot."""
    panels = [_panel(run, "fvu", "FVU"), _panel(run, "ce", "validation cross-entropy (nats)")]
    return Picture("frontier", "Frontier", panels)


def _panel(run: Run, quality: str, label: str) -> Panel:
    last = run.last_of("val/l0", f"val/{quality}")
    measured = {
        "held": _points(run, quality, settled=True),
        "not settled": _points(run, quality, settled=False),
        "last validation": [(last[0], last[1])] if last else [],
    }
    # L0 is 0 where a run has collapsed
    shown = {name: [point for point in points if point[0] > 0] for name, points in measured.items()}
    lines = [_line(name, points) for name, points in shown.items() if points]
    left_out = [not_drawn("L0")] if shown != measured else []
    notes = [] if measured["held"] or measured["not settled"] else ["controller=pareto draws a frontier"]
    if shown["not settled"]:
        notes.append(f"{len(shown['not settled'])} not settled")
    return Panel(
        "FVU" if quality == "fvu" else "Cross-entropy",
        axis("L0 (active latents per row)", [v for one in lines for v in one.x], log=True, pad=0.08),
        axis(label, [v for one in lines for v in one.y], pad=0.1),
        lines,
        notes=[*notes, *left_out] if lines else (),
        missing=None if lines else [*left_out, f"no val/{quality} in the rows: it comes with the first validation"][0],
        optional=quality == "ce" and not left_out,
    )


def _line(name: str, points: Sequence[tuple[float, float]]) -> Line:
    role, kind = _LOOK[name]
    return Line(name, role, [p[0] for p in points], [p[1] for p in points], kind=kind)


def _points(run: Run, quality: str, settled: bool) -> list[tuple[float, float]]:
    """(L0, quality) of the values that a controller was to hold, by whether its loop came to rest there. The last value
    is recorded at the end of each budget that the run has had: the latest counts."""
    rows = [row for row in run.rows if finite(row.get("frontier/l0")) and finite(row.get(f"frontier/{quality}"))]
    latest = {row["frontier/target"]: row for row in rows}.values()
    kept = [row for row in latest if bool(row["frontier/settled"]) == settled]
    return sorted((row["frontier/l0"], row[f"frontier/{quality}"]) for row in kept)
