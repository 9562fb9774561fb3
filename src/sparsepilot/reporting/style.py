"""Colours and strokes: what a line looks like, on paper and on screen, by day and by night.

The eight colours stay apart for colour-blind readers (after Okabe and Ito, darkened for white paper); dash and marker
say the same again without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

from sparsepilot.reporting.figure import Band, Line, Picture, Role


class Colour(NamedTuple):
    """One colour on a light and on a dark ground."""

    light: str
    dark: str


PALETTE = (
    Colour("#0b6bb8", "#5aa9e6"),  # blue
    Colour("#d1520b", "#ff8f50"),  # vermilion
    Colour("#00855f", "#35c99c"),  # green
    Colour("#a8407f", "#e48cc0"),  # purple
    Colour("#b88a00", "#f0c84a"),  # ochre
    Colour("#3aa3d4", "#9ad8fb"),  # sky
    Colour("#6b4fb3", "#b7a2f5"),  # violet
    Colour("#5c6570", "#b4bdc8"),  # grey
)
INK = Colour("#1c2128", "#e9edf2")
QUIET = Colour("#667080", "#98a3b3")
GRID = Colour("#e8ebef", "#2a313b")
FRAME = Colour("#b9c0c9", "#4b5563")
GROUND = Colour("#ffffff", "#151a21")
SHADE = Colour("#8a94a3", "#8a94a3")

_BY_ROLE = {
    "measured": PALETTE[0],
    "set_point": PALETTE[1],
    "validation": INK,
    "unsettled": PALETTE[0],
    "part": PALETTE[2],
    "density": PALETTE[0],
}


Symbol = Literal["circle", "square", "diamond", "triangle-up"]

DASH = (5.0, 3.0)
ROUNDS: tuple[tuple[tuple[float, ...], Symbol], ...] = (
    ((), "circle"), ((1.3, 1.7), "square"), ((9.0, 2.0), "diamond"), ((9.0, 2.0, 1.3, 2.0), "triangle-up"),
)  # fmt: skip
"""Dash and marker of the first eight runs, of the next eight that have the same colours, ..."""


class Look(NamedTuple):
    """How a line is drawn."""

    colour: Colour
    width: float
    """points"""
    dash: tuple[float, ...]
    """lengths of strokes and gaps in widths of the line; (): solid"""
    ring: bool
    """markers filled with the ground's colour"""
    symbol: Symbol
    """of markers"""


def look(line: Line, num_runs: int) -> Look:
    """By the line's role; with several runs the colour is the run's."""
    colour = _BY_ROLE[line.role] if num_runs == 1 else PALETTE[line.run % len(PALETTE)]
    noisy = num_turns(line.y) > 0.3 * len(line.y) > 30
    width = {"set_point": 1.6, "part": 1.3, "density": 1.4}.get(line.role, 0.9 if noisy else 1.5)
    turn = 0 if num_runs == 1 else max(0, line.run) // len(PALETTE) % len(ROUNDS)
    dash, symbol = ROUNDS[turn]
    if line.role == "set_point" or (line.role == "part" and num_runs > 1):
        dash = DASH + turn * (1.3, 3.0)  # dots between the strokes
    return Look(colour, width, dash, ring=line.role in ("validation", "unsettled"), symbol=symbol)


def band_colour(run: int | None) -> Colour:
    """Of a shaded stretch: a run's own, or neutral."""
    return SHADE if run is None else PALETTE[run % len(PALETTE)]


def band_alpha(band: Band) -> float:
    """How strongly it is shaded."""
    return 0.15 if band.share is None else 0.05 + 0.2 * band.share


def num_turns(y: Sequence[float]) -> int:
    """How often a curve turns round: more often than smooth ones do, noise is drawn in a fine line.

    >>> num_turns([1, 2, 3, 3, 2, 5])
    2
    """
    rises = [b > a for a, b in pairwise(y) if a != b]
    return sum(a != b for a, b in pairwise(rises))


def key_look(line: Line) -> Look:
    """How a legend shows what dash and marker mean, where colours are runs."""
    return look(replace(line, run=0), 2)._replace(colour=QUIET)


KEYS: tuple[Role, ...] = ("set_point", "validation", "unsettled", "part")
"""Roles that dash or marker tell apart where colours are runs."""


def key_names(picture: Picture) -> list[tuple[str, int, Line]]:
    """What dash and marker mean where colours are runs: the names that lines of a role have in this picture, the panel
    of the first, and that line."""
    lines = [(i, line) for i, panel in enumerate(picture.panels) for line in panel.lines]
    found = []
    for role in KEYS:
        these = [(i, line) for i, line in lines if line.role == role]
        if these:
            names = dict.fromkeys("I part" if role == "part" else line.name for _, line in these)
            found.append((", ".join(names), *these[0]))
    return found
