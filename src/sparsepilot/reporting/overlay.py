"""Several runs' drawings of one picture, laid over one another."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from sparsepilot.reporting.figure import Axis, Band, Panel, Picture, axis

T = TypeVar("T", bound=Hashable)


def overlay(pictures: Sequence[Picture], labels: Sequence[str]) -> Picture:
    """One picture with the lines of all, each marked with the number of its run; axes reach over all of them."""
    panels = [_overlay_panels(panels) for panels in zip(*(p.panels for p in pictures), strict=True)]
    there = [panel for panel in panels if not (panel.missing and panel.optional)]
    return replace(pictures[0], panels=there, run_labels=tuple(labels))


def _overlay_panels(panels: Sequence[Panel]) -> Panel:
    if len(panels) == 1:
        return panels[0]
    there = [panel for panel in panels if panel.missing is None]
    if not there:
        return replace(panels[0], optional=any(panel.optional for panel in panels))
    first = there[0]
    there = [panel for panel in there if _stem(panel.y) == _stem(first.y)]  # one panel never mixes two quantities
    notes: list[str] = []  # one run's own are not these runs'
    if len(there) < len(panels):
        notes.append(f"{len(there)} of {len(panels)} runs have this")
        others = _unique(_stem(panel.y) for panel in panels if panel.missing is None and panel not in there)
        notes += [f"not drawn: {other} of the others" for other in others]
    aligned = len({panel.top_per_x for panel in there}) == 1
    if first.top is not None and not aligned:
        notes.append(f"batch sizes differ, so there is no common axis of {first.top.label}")
    return replace(
        first,
        title=first.title,
        x=_longest([panel.x for panel in there]),
        y=_reach([panel.y for panel in there]),
        top=_longest([panel.top for panel in there if panel.top]) if first.top and aligned else None,
        lines=[replace(line, run=run) for run, panel in enumerate(panels) if panel in there for line in panel.lines],
        bands=_bands(panels, there),
        rules=_unique(rule for panel in there for rule in panel.rules),
        notes=notes,
    )


def _reach(axes: Sequence[Axis]) -> Axis:
    label = axes[0].label if len({axis.label for axis in axes}) == 1 else _stem(axes[0])
    low, high = min(a.low for a in axes), max(a.high for a in axes)
    wider = axis(label, [low, high], log=axes[0].log)
    # an end that all have in common is where the axis was meant to end
    return replace(
        axes[0],
        label=label,
        low=low if all(a.low == low for a in axes) else wider.low,
        high=high if all(a.high == high for a in axes) else wider.high,
    )


def _bands(panels: Sequence[Panel], there: Sequence[Panel]) -> list[Band]:
    """Those that all runs have once, without a run's colour; the others with it."""
    common = [band for band in there[0].bands if all(band in panel.bands for panel in there)]
    own = [
        replace(band, run=run)
        for run, panel in enumerate(panels)
        if panel in there
        for band in panel.bands
        if band not in common
    ]
    return common + own


def _longest(axes: Sequence[Axis]) -> Axis:
    return replace(axes[0], low=min(a.low for a in axes), high=max(a.high for a in axes))


def _stem(axis: Axis) -> str:
    return axis.label.partition(" (")[0]


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
