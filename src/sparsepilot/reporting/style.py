"""Colours and strokes: what a line looks like, on paper and on screen, by day and by night.

The eight colours stay apart for colour-blind readers (after Okabe and Ito, darkened for white paper); dash and marker
say the same again without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from sparsepilot.reporting.figure import Line, Role


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
    "part": PALETTE[2],
    "density": PALETTE[0],
}


class Look(NamedTuple):
    """How a line is drawn."""

    colour: Colour
    width: float
    """points"""
    dashed: bool
    ring: bool
    """markers filled with the ground's colour"""


def look(line: Line, num_runs: int) -> Look:
    """By the line's role; with several runs the colour is the run's."""
    colour = _BY_ROLE[line.role] if num_runs == 1 else PALETTE[line.run % len(PALETTE)]
    noisy = num_turns(line.y) > 0.3 * len(line.y) > 30
    width = {"set_point": 1.6, "part": 1.3, "density": 1.4}.get(line.role, 0.9 if noisy else 1.5)
    dashed = line.role == "set_point" or (line.role == "part" and num_runs > 1)
    return Look(colour, width, dashed, ring=line.role == "validation")


def band_colour(run: int | None) -> Colour:
    """Of a shaded stretch: a run's own, or neutral."""
    return SHADE if run is None else PALETTE[run % len(PALETTE)]


def num_turns(y: Sequence[float]) -> int:
    """How often a curve turns round: more often than smooth ones do, noise is drawn in a fine line.

    >>> num_turns([1, 2, 3, 3, 2, 5])
    2
    """
    rises = [b > a for a, b in pairwise(y) if a != b]
    return sum(a != b for a, b in pairwise(rises))


def key_look(line: Line) -> Look:
    """How a legend shows what dash and marker mean, where colours are runs."""
    return look(line, 2)._replace(colour=QUIET)


ROLE_NAMES: dict[Role, str] = {"set_point": "set point", "validation": "validation", "part": "I part"}
"""What dash and marker mean where colours are runs."""
