"""Pictures as plotly.js figures: plain dictionaries, one per picture, drawn by the page.

Data are the numbers that as_image.py draws, too. Ticks are the same until a reader zooms; then plotly chooses its own.
"""

from __future__ import annotations

import re
from math import isnan, log10
from typing import Any

from sparsepilot.reporting.figure import Axis, Line, Panel, Picture, wrapped
from sparsepilot.reporting.style import QUIET, Colour, Look, band_alpha, band_colour, key_look, key_names, look
from sparsepilot.reporting.ticks import minor_places, ticks

GAPS = {1: 0.0, 2: 0.12}
GAP = 0.075
"""between panels, as a share of the picture's width"""


def figure(picture: Picture) -> dict[str, Any]:
    """{"data": traces, "layout": layout}; colours are {"light", "dark"} pairs under `meta`, the page picks."""
    num_panels = len(picture.panels)
    data: list[dict[str, Any]] = []
    keys = _keys(picture)
    # a panel's title has a row of its own above its legend: beside each other they have no room on a narrow screen
    stacked = any(panel.title for panel in picture.panels) and (bool(keys) or any(map(_has_legend, picture.panels)))
    layout: dict[str, Any] = {"annotations": [], "shapes": [], "meta": {"top": {}, "stacked": stacked}}
    gap = GAPS.get(num_panels, GAP)
    width = (1 - gap * (num_panels - 1)) / num_panels
    for i, panel in enumerate(picture.panels):
        x, y = _names(i)
        left = i * (width + gap)
        layout[_full(x)] = _axis(panel.x, anchor=y) | {"domain": [left, left + width]}
        layout[_full(y)] = _axis(panel.y, anchor=x)
        if panel.missing is not None:
            for name in (x, y):
                layout[_full(name)] |= {"showticklabels": False, "ticks": "", "showgrid": False, "minor": {"ticks": ""}}
        legend = _legend(i)
        data += [_trace(line, x, y, picture) | {"legend": legend} for line in panel.lines]
        if not panel.lines:  # axes without a trace are not drawn
            data.append(_helper(panel, x, y))
        layout[legend] = {"x": left, "xanchor": "left", "y": 1, "yanchor": "bottom", "orientation": "h"}
        if panel.top is not None and panel.missing is None:
            top = f"x{num_panels + i + 1}"
            layout[_full(top)] = _top_axis(panel, x, y)
            layout["meta"]["top"][_full(top)] = panel.top_per_x
            data.append(_helper(panel, top, y))
        layout["shapes"] += _shapes(panel, x, y)
        layout["annotations"] += _annotations(panel, x, y, stacked)
    return {"data": data + keys, "layout": layout}


def _has_legend(panel: Panel) -> bool:
    return len(panel.lines) > 1


def _names(i: int) -> tuple[str, str]:
    return ("x", "y") if i == 0 else (f"x{i + 1}", f"y{i + 1}")


def _legend(i: int) -> str:
    return "legend" if i == 0 else f"legend{i + 1}"


def _full(name: str) -> str:
    return name[0] + "axis" + name[1:]


def power_text(text: str) -> str:
    """`10^3` with a raised 3.

    >>> power_text("10^-3")
    '10<sup>&#8722;3</sup>'
    """
    return re.sub(r"10\^(-?\d+)", lambda m: f"10<sup>{m[1].replace('-', '&#8722;')}</sup>", text)


def _axis(axis: Axis, anchor: str) -> dict[str, Any]:
    places = ticks(axis)
    return {
        "type": "log" if axis.log else "linear",
        "title": {"text": axis.label},
        "range": [log10(axis.low), log10(axis.high)] if axis.log else [axis.low, axis.high],
        "hoverformat": ".4~s" if axis.text == "samples" else ",.6~g",
        "tickmode": "array",
        "tickvals": [t.value for t in places],
        "ticktext": [power_text(t.text) for t in places],
        "minor": {"tickmode": "array", "tickvals": minor_places(axis), "ticks": "outside", "ticklen": 3},
        "anchor": anchor,
    }


def _top_axis(panel: Panel, x: str, y: str) -> dict[str, Any]:
    """The axis above, in the units of the one below so that it stays aligned under zoom."""
    assert panel.top is not None
    axis = _axis(panel.top, anchor=y)
    for part in (axis, axis["minor"]):
        part["tickvals"] = [v / panel.top_per_x for v in part["tickvals"]]
    below = _axis(panel.x, anchor=y)
    return axis | {"range": below["range"], "overlaying": x, "matches": x, "side": "top", "showgrid": False}


def _helper(panel: Panel, x: str, y: str) -> dict[str, Any]:
    """A trace without a point."""
    return {"x": [panel.x.low], "y": [None], "xaxis": x, "yaxis": y, "showlegend": False, "hoverinfo": "skip",
            "legend": "legend", "meta": {"helper": True}}  # fmt: skip


def _trace(line: Line, x: str, y: str, picture: Picture) -> dict[str, Any]:
    num_runs = len(picture.run_labels)
    how = look(line, num_runs)
    of_one = num_runs > 1 and line.run >= 0
    label = picture.run_labels[line.run] if of_one else line.name
    name = label if not of_one else f"{label}, {line.name}"
    trace: dict[str, Any] = {
        "x": list(line.x),
        "y": [None if isnan(v) else v for v in line.y],  # JSON has no NaN
        "xaxis": x,
        "yaxis": y,
        "name": label,
        "showlegend": num_runs == 1 and any(_has_legend(panel) and line in panel.lines for panel in picture.panels),
        "mode": {"line": "lines", "steps": "lines", "points": "markers", "joined_points": "lines+markers"}[line.kind],
        "line": {
            "width": round(1.3 * how.width, 2),
            "dash": _dash(how),
            "simplify": False,
        },  # plotly's simplified lines tilt what is level
        "hovertemplate": f"{name}: %{{y:.5g}}<extra></extra>",
        "meta": {"colour": _pair(how.colour), "ring": how.ring, "role": line.role, "run": line.run},
    }
    if line.kind == "steps":
        trace["line"]["shape"] = "hv"
        if num_runs == 1:
            trace["fill"] = "tozeroy"
    if line.kind in ("points", "joined_points"):
        trace["marker"] = {"size": 6.5, "symbol": how.symbol, "line": {"width": 1.5}}
        trace["cliponaxis"] = False
    if line.end_dot and line.x:
        trace["mode"] = "lines+markers"
        trace["marker"] = {"size": [0] * (len(line.x) - 1) + [9], "line": {"width": 0}, "opacity": 1}
        trace["cliponaxis"] = False
    return trace


def _keys(picture: Picture) -> list[dict[str, Any]]:
    """With several runs: entries that say what dash and marker mean."""
    if len(picture.run_labels) == 1:
        return []
    entries = []
    for name, i, found in key_names(picture):
        how = key_look(found)
        entries.append({
            "x": [None], "y": [None], "name": name, "showlegend": True, "hoverinfo": "skip", "legend": _legend(i),
            "mode": "markers" if found.kind == "points" else "lines",
            "line": {"width": 1.6, "dash": _dash(how)},
            "marker": {"size": 6.5, "symbol": how.symbol, "line": {"width": 1.5}},
            "meta": {"colour": _pair(how.colour), "ring": how.ring, "helper": True, "role": found.role},
        })  # fmt: skip
    return entries


def _shapes(panel: Panel, x: str, y: str) -> list[dict[str, Any]]:
    bands = [
        {
            "type": "rect", "xref": x, "yref": f"{y} domain", "x0": band.low, "x1": band.high, "y0": 0, "y1": 1,
            "line": {"width": 1 if band.share is None else 0, "color": band_colour(band.run).light},
            "layer": "below", "opacity": band_alpha(band),
            "fillcolor": band_colour(band.run).light,
        }
        for band in panel.bands
    ]  # fmt: skip
    rules = [
        {"type": "line", "xref": f"{x} domain", "yref": y, "x0": 0, "x1": 1, "y0": rule.y, "y1": rule.y,
         "layer": "below", "line": {"width": 1, "color": QUIET.light}}
        for rule in panel.rules
    ]  # fmt: skip
    return bands + rules


def _annotations(panel: Panel, x: str, y: str, stacked: bool) -> list[dict[str, Any]]:
    """Title, names of bands, what is missing; the page has a panel's notes below the picture."""
    here = {"xref": f"{x} domain", "yref": f"{y} domain", "showarrow": False}
    found: list[dict[str, Any]] = []
    if panel.title:
        found.append(here | {"x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left", "yshift": 26 if stacked else 4,
                             "name": "title", "text": f"<b>{panel.title}</b>"})  # fmt: skip
    named = {band.label: band for band in reversed(panel.bands) if band.label}
    for i, (label, band) in enumerate(reversed(named.items())):
        found.append(here | {"xref": x, "x": band.low, "y": 0.985 - 0.07 * i, "xanchor": "left", "yanchor": "top",
                             "xshift": 3, "text": label, "name": "note",
                             "meta": None if band.run is None else _pair(band_colour(band.run))})  # fmt: skip
    if panel.missing is not None:
        found.append(here | {"x": 0.5, "y": 0.5, "text": "<br>".join(wrapped(panel.missing)), "name": "note"})
    return found


def _dash(how: Look) -> str:
    return ",".join(f"{length:g}px" for length in how.dash) or "solid"


def _pair(colour: Colour) -> dict[str, str]:
    return {"light": colour.light, "dark": colour.dark}
