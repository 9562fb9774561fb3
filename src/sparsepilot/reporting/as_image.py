"""Pictures as PNG and SVG, by matplotlib."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsepilot.reporting.figure import Axis, Line, Panel, Picture, wrapped
from sparsepilot.reporting.style import (
    FRAME,
    GRID,
    GROUND,
    INK,
    QUIET,
    Look,
    band_alpha,
    band_colour,
    key_look,
    key_names,
    look,
)
from sparsepilot.reporting.ticks import minor_places, ticks
from sparsepilot.run_folder import replacing_path

DPI = 150
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^"}
SETTINGS: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK.light,
    "axes.edgecolor": FRAME.light,
    "axes.linewidth": 0.8,
    "text.color": INK.light,
    "xtick.color": QUIET.light,
    "ytick.color": QUIET.light,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.hashsalt": "sparsepilot",  # the same picture is the same file
}


def write_images(picture: Picture, folder: Path, subtitle: str = "") -> list[Path]:
    """Writes `<name>.png` and `<name>.svg`; returns their paths."""
    import matplotlib

    paths = []
    with matplotlib.rc_context(SETTINGS):
        figure = draw_figure(picture, subtitle)
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            path = folder / f"{picture.name}.{kind}"
            with replacing_path(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
            paths.append(path)
    return paths


def draw_figure(picture: Picture, subtitle: str = "") -> Any:
    """The matplotlib Figure of a picture; its axes have one size, whatever stands above them."""
    from matplotlib.figure import Figure

    num_panels = len(picture.panels)
    width = {1: 7.2, 2: 10.4, 3: 13.2}.get(num_panels, 16.4)
    left, right, gap, below, panel_height = 0.80, 0.32, 0.84, 0.58, 3.05  # inches
    most = int((width - 1.2) / 0.074)  # characters that a name has room for
    runs = [("\n".join(textwrap.wrap(name, most) or [""]), handle) for name, handle in _run_legend(picture)]
    columns = max(1, min(len(runs), int((width - 0.4) / (0.75 + 0.074 * max((len(n) for n, _ in runs), default=1)))))
    run_rows = -(-len(runs) // columns) if columns > 1 else sum(1 + name.count("\n") for name, _ in runs)
    has_keys = any(panel.title or panel.notes or _line_legend(panel, picture) for panel in picture.panels)
    has_top = any(panel.top for panel in picture.panels)
    # a panel's title and more than two keys have no room side by side
    stacked = any(panel.title and len(_line_legend(panel, picture)) > 2 for panel in picture.panels)
    above = 0.52 + 0.22 * run_rows + 0.34 * has_keys + 0.46 * has_top + 0.22 * stacked
    height = above + panel_height + below
    panel_width = (width - left - right - gap * (num_panels - 1)) / num_panels
    figure = Figure(figsize=(width, height), facecolor=GROUND.light)
    for i, panel in enumerate(picture.panels):
        place = ((left + i * (panel_width + gap)) / width, below / height, panel_width / width, panel_height / height)
        ax = figure.add_axes(place)
        _draw_panel(ax, panel, len(picture.run_labels), title_pad=6.0 + 16.0 * stacked)
        keys = _line_legend(panel, picture)
        if keys:
            beside = bool(panel.title) and not stacked
            _legend(ax, keys, loc="lower right" if beside else "lower left", ncols=len(keys),
                    bbox_to_anchor=(1.0 if beside else 0.0, 1.02))  # fmt: skip
    figure.text(0.18 / width, 1 - 0.31 / height, picture.title, fontsize=12.5, fontweight="bold", va="baseline")
    room = width - right - 0.18 - 0.12 * len(picture.title) - 0.2  # inches
    subtitle = tail(subtitle, int(room / 0.075))
    figure.text(1 - right / width, 1 - 0.31 / height, subtitle, fontsize=8.5, color=QUIET.light, ha="right")
    if runs:
        _legend(figure, runs, loc="upper left", ncols=columns, bbox_to_anchor=(0.18 / width, 1 - 0.42 / height))
    return figure


def tail(text: str, most: int) -> str:
    """Its end, where all of it has no room: of a folder that is its name.

    >>> tail("runs/demo", 9), tail("/scratch/somebody/runs/demo", 10)
    ('runs/demo', '…runs/demo')
    """
    return text if len(text) <= most else "…" + text[len(text) - max(0, most - 1) :]


def _legend(where: Any, entries: Sequence[tuple[str, Any]], **placing: Any) -> None:
    where.legend(
        [handle for _, handle in entries], [name for name, _ in entries], frameon=False, fontsize=9, handlelength=1.9,
        columnspacing=1.5, handletextpad=0.6, borderaxespad=0.0, borderpad=0.0, labelspacing=0.35, **placing,
    )  # fmt: skip


def _draw_panel(ax: Any, panel: Panel, num_runs: int, title_pad: float) -> None:
    ax.set_axisbelow(True)
    _set_axis(ax.xaxis, ax.set_xscale, ax.set_xlim, panel.x)
    _set_axis(ax.yaxis, ax.set_yscale, ax.set_ylim, panel.y)
    ax.set_xlabel(panel.x.label)
    ax.set_ylabel(panel.y.label)
    if panel.title:
        ax.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=title_pad)
    ax.grid(visible=True, which="major", color=GRID.light, linewidth=0.8)
    ax.tick_params(which="both", color=FRAME.light, length=3.5)
    ax.tick_params(which="minor", length=2)
    ax.spines["right"].set_visible(False)
    ax.spines["top"].set_visible(panel.top is not None)
    if panel.top is not None and panel.missing is None:
        factor = panel.top_per_x
        top = ax.secondary_xaxis("top", functions=(lambda x: x * factor, lambda x: x / factor))
        top.set_xscale("log" if panel.top.log else "linear")
        _set_ticks(top.xaxis, panel.top)
        top.set_xlabel(panel.top.label, labelpad=6)
        top.tick_params(which="both", color=FRAME.light, length=3.5)
        top.tick_params(which="minor", length=2)
    for band in panel.bands:
        edge = 0.8 if band.share is None else 0.0
        ax.axvspan(band.low, band.high, color=band_colour(band.run).light, alpha=band_alpha(band), linewidth=edge)
    for rule in panel.rules:
        ax.axhline(rule.y, color=QUIET.light, linewidth=0.9)
    for line in panel.lines:
        _draw_line(ax, line, num_runs)
    if panel.missing is not None:
        ax.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
        ax.grid(visible=False)
        text = "\n".join(wrapped(panel.missing))
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=QUIET.light)
    named = {band.label: band for band in reversed(panel.bands) if band.label}  # each kind is named once
    for i, (label, band) in enumerate(reversed(named.items())):
        ax.annotate(label, xy=(band.low, 0.98 - 0.06 * i), xycoords=("data", "axes fraction"), xytext=(4, 0),
                    textcoords="offset points", va="top", fontsize=8.5,
                    color=QUIET.light if band.run is None else band_colour(band.run).light)  # fmt: skip
    if panel.notes:
        crowded = panel.title and (len(panel.lines) > 1 or num_runs > 1)  # title and legend stand above
        place = {"x": 0.99, "y": 0.98, "va": "top"} if crowded else {"x": 1.0, "y": 1.02, "va": "bottom"}
        ax.text(s="\n".join(panel.notes), ha="right", transform=ax.transAxes, fontsize=8.5, color=QUIET.light, **place)


def _draw_line(ax: Any, line: Line, num_runs: int) -> None:
    how = look(line, num_runs)
    colour = how.colour.light
    if line.kind == "steps":
        if num_runs == 1:
            ax.stairs(line.y[:-1], line.x, fill=True, color=colour, alpha=0.22)
        ax.stairs(line.y[:-1], line.x, color=colour, linewidth=how.width, linestyle=_stroke(how))
        return
    marked = line.kind != "line"
    ax.plot(
        line.x, line.y, color=colour, linewidth=how.width, zorder=3 if line.role == "set_point" or how.ring else 2.5,
        linestyle="none" if line.kind == "points" else _stroke(how, 0.9),
        marker=MARKERS[how.symbol] if marked else None, markersize=4.6, markeredgewidth=1.2, markeredgecolor=colour,
        markerfacecolor=GROUND.light if how.ring else colour, solid_joinstyle="round", clip_on=not marked,
    )  # fmt: skip
    if line.end_dot and line.x:
        ax.plot(line.x[-1:], line.y[-1:], "o", color=colour, markersize=6, clip_on=False, zorder=4)


def _line_legend(panel: Panel, picture: Picture) -> list[tuple[str, Any]]:
    """One run: what the lines of a panel are, where they are several."""
    if len(picture.run_labels) > 1 or len(panel.lines) < 2:
        return []
    return [(line.name, _handle(line, look(line, 1))) for line in panel.lines]


def _run_legend(picture: Picture) -> list[tuple[str, Any]]:
    """Several runs: whose the lines are, and what dash and marker say."""
    num_runs = len(picture.run_labels)
    if num_runs == 1:
        return []
    whose = [Line("", "measured", [], [], run=run) for run in range(num_runs)]
    entries = [(picture.run_labels[line.run], _handle(line, look(line, num_runs))) for line in whose]
    return entries + [(name, _handle(found, key_look(found))) for name, _, found in key_names(picture)]


def _handle(line: Line, how: Look) -> Any:
    from matplotlib.lines import Line2D

    colour = how.colour.light
    marked = line.kind in ("points", "joined_points")
    return Line2D(
        [], [], color=colour, linewidth=max(1.4, how.width),
        marker=MARKERS[how.symbol] if marked else None, markersize=4.6,
        markeredgecolor=colour, markeredgewidth=1.2, markerfacecolor=GROUND.light if how.ring else colour,
        linestyle="none" if line.kind == "points" else _stroke(how, 0.6),
    )  # fmt: skip


def _stroke(how: Look, scale: float = 1.0) -> Any:
    return (0, tuple(scale * length for length in how.dash)) if how.dash else "-"


def _set_axis(mpl_axis: Any, set_scale: Any, set_limits: Any, axis: Axis) -> None:
    set_scale("log" if axis.log else "linear")
    set_limits(axis.low, axis.high)
    _set_ticks(mpl_axis, axis)


def _set_ticks(mpl_axis: Any, axis: Axis) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter

    places: Sequence[Any] = ticks(axis)
    mpl_axis.set_ticks([t.value for t in places], labels=[power_text(t.text) for t in places])
    mpl_axis.set_minor_locator(FixedLocator(minor_places(axis)))
    mpl_axis.set_minor_formatter(NullFormatter())


def power_text(text: str) -> str:
    """`10^3` with a raised 3, as plain characters: mathtext's parser would take longer than the picture.

    >>> power_text("10^-3")
    '10⁻³'
    """
    return re.sub(r"\^(-?\d+)", lambda m: m[1].translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")), text)
