"""A picture before it is drawn: numbers, labels and scales, the same for a file and for a page.

A picture is a row of panels, a panel has lines on two axes. Nothing here knows a plotting library; as_image.py and
as_plotly.py draw what is said here and decide nothing about the numbers.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["measured", "set_point", "validation", "unsettled", "part", "density"]
"""What a line is, hence how it looks. With several runs the colour is the run's, dash and marker stay the role's."""

TickText = Literal["number", "power", "samples"]
"""1,000 or 10^3 or 1k (500M, 1G)"""


@dataclass(frozen=True)
class Axis:
    """One axis: what stands beside it, its scale and the range that is drawn."""

    label: str
    low: float
    high: float
    log: bool = False
    text: TickText = "number"
    most_ticks: int = 8
    zero_tick: bool = True
    """False leaves out a tick at 0, where the corner says it already"""


@dataclass(frozen=True)
class Line:
    """One series.

    y[i] belongs to x[i]. `steps` holds y[i] from x[i] to x[i + 1]. A NaN in y breaks the line.
    """

    name: str
    role: Role
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["line", "points", "joined_points", "steps"] = "line"
    end_dot: bool = False
    num_points: int = 0
    """how many there were before thinning; 0: all are here"""
    run: int = 0
    """whose it is; -1: it goes through several runs"""


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis."""

    low: float
    high: float
    label: str
    run: int | None = None
    """None: of all runs"""
    share: float | None = None
    """of the stretch to which it applies, of one of many stretches that are drawn without an edge; None: of one drawn
    with an edge, so that it is seen however short it is"""


@dataclass(frozen=True)
class Rule:
    """A thin horizontal line at a value that means something."""

    y: float
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """Axes with what is drawn on them.

    `top` is a second x axis above, aligned with the one below: a place x below is `top_per_x * x` above. Where the
    data of a panel are not there, `missing` says what would make them.
    """

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    top: Axis | None = None
    top_per_x: float = 1.0
    bands: Sequence[Band] = ()
    rules: Sequence[Rule] = ()
    notes: Sequence[str] = ()
    missing: str | None = None
    optional: bool = False
    """left out where its data are missing"""


@dataclass(frozen=True)
class Picture:
    """What one file shows."""

    name: str
    """of its files"""
    title: str
    panels: Sequence[Panel]
    run_labels: Sequence[str] = field(default=("",))
    """with more than one, lines are coloured by run"""


def wrapped(text: str, most: int = 36) -> list[str]:
    """The lines of what a panel says.

    >>> wrapped("no val/ce in the rows: cross_entropy=spliced measures it")
    ['no val/ce in the rows:', 'cross_entropy=spliced measures it']
    """
    return [line for part in re.split(r"(?<=:) ", text) for line in textwrap.wrap(part, most, break_long_words=False)]


def axis(
    label: str,
    values: Iterable[float],
    *,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
    pad: float = 0.04,
    text: TickText = "number",
) -> Axis:
    """An axis that holds all `values`, with a margin of `pad` of its length where no end is given.

    >>> axis("L0", [1, 100], log=True, pad=0.0)
    Axis(label='L0', low=1.0, high=100.0, log=True, text='number', most_ticks=8, zero_tick=True)
    """
    to, back = (math.log10, lambda v: 10.0**v) if log else (float, float)
    kept = [to(v) for v in values if v > 0 or not log]
    first, last = (min(kept), max(kept)) if kept else (to(0.1 if log else 0.0), to(1.0))
    if low is not None:
        first = to(low)
    if high is not None:
        last = to(high)
    if last - first < 1e-9 * max(1.0, abs(last)):  # one value: room around it
        room = 0.5 if log else 0.5 * abs(last) or 0.5
        first, last = (first - (low is None) * room, last + (high is None) * room)
        if last <= first:
            last = first + 1.0
    margin = pad * (last - first)
    return Axis(
        label,
        back(first - margin if low is None else first),
        back(last + margin if high is None else last),
        log=log,
        text=text,
    )
