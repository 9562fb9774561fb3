"""Whether a controller is well: its strength, its error, what its law adds up, and where it stood at a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sparsepilot.reporting.build import absent, line, over_millions, zeros
from sparsepilot.reporting.figure import Band, Panel, Picture, Rule, axis
from sparsepilot.reporting.pictures.control import knob_label
from sparsepilot.reporting.runs import Run

PLACE = 8
CLOSED_LOOP = "this controller does not measure; controller=l0_target does"


def draw(run: Run) -> Picture:
    """Strength (log), ln(measured / set point), and the P and I parts of log strength; shaded where at a limit."""
    limits = at_limit(*run.series("samples", "controller/at_limit"), run.budget_samples)
    unnamed = [replace(band, label="") for band in limits]
    panels = [_strength(run, limits), _error(run, unnamed), _parts(run, unnamed)]
    return Picture("controller_health", "Controller", panels)


def at_limit(samples: Sequence[float], flags: Sequence[float], budget_samples: float) -> list[Band]:
    """The stretches, in millions of samples, whose rows say that the knob stood at a limit; where it came and went more
    than MOST_BANDS times, by what share of each of STRETCHES equal parts of the budget.

    >>> [(b.low, b.high) for b in at_limit([1e6, 2e6, 3e6, 4e6], [0, 1, 1, 0], 4e6)]
    [(1.0, 3.0)]
    >>> bands = at_limit([i * 1e3 for i in range(1, 1201)], [i % 2 for i in range(1200)], 1.2e6)
    >>> len(bands), bands[0].low, bands[0].high, bands[0].share
    (1, 0.0, 1.2, 0.5)
    """
    spans: list[tuple[float, float]] = []
    before, open_at = 0.0, None
    for place, flag in zip(samples, flags, strict=True):
        if flag and open_at is None:
            open_at = before
        if not flag and open_at is not None:
            spans.append((open_at, before))
            open_at = None
        before = place
    if open_at is not None:
        spans.append((open_at, before))
    if len(spans) > MOST_BANDS:
        return _shares(spans, budget_samples / STRETCHES)
    return [Band(low / 1e6, high / 1e6, AT_LIMIT) for low, high in spans]


MOST_BANDS, STRETCHES, LEVELS = 60, 300, 4
"""Bands that are still told apart, each with its edge; stretches, and steps of shading, in place of more."""
AT_LIMIT = "at a limit"


def _shares(spans: Sequence[tuple[float, float]], width: float) -> list[Band]:
    """Bands of so many equal stretches, each with its share in LEVELS; neighbours of one share are one band."""
    held: dict[int, float] = {}
    for low, high in spans:
        for stretch in range(int(low / width), int(high / width) + 1):
            inside = min(high, (stretch + 1) * width) - max(low, stretch * width)
            held[stretch] = held.get(stretch, 0.0) + max(0.0, inside)
    bands: list[Band] = []
    for stretch, length in sorted(held.items()):
        if length <= 1e-6 * width:  # where a stretch ends and the next one begins
            continue
        share = math.ceil(LEVELS * min(1.0, length / width) - 1e-6) / LEVELS  # a little is seen, too
        low, high = stretch * width / 1e6, (stretch + 1) * width / 1e6
        if bands and bands[-1].share == share and bands[-1].high == low:
            bands[-1] = replace(bands[-1], high=high)
        else:
            bands.append(Band(low, high, AT_LIMIT, share=share))
    return bands


def _strength(run: Run, limits: Sequence[Band]) -> Panel:
    strength = line(run, "strength", "measured", "samples_M", "controller/strength", positive=True)
    notes, missing = zeros(run, "strength", "controller/strength"), None
    if not strength.x:
        notes, missing = [], absent(run, "controller/strength") or "strength was 0 throughout"
    return Panel(
        "Strength",
        over_millions(run),
        axis(knob_label(run), strength.y, log=True),
        [strength] if strength.x else [],
        bands=limits,
        notes=notes,
        missing=missing,
    )


def _error(run: Run, limits: Sequence[Band]) -> Panel:
    error = line(run, "error", "measured", "samples_M", "controller/error")
    reach = 1.05 * max((abs(v) for v in error.y), default=1.0) or 1.0
    return Panel(
        "Error",
        over_millions(run),
        axis("ln(measured / set point)", error.y, low=-reach, high=reach),
        [error] if error.x else [],
        bands=limits if error.x else (),
        rules=[Rule(0.0)] if error.x else [],
        missing=None if error.x else f"no controller/error in the rows: {CLOSED_LOOP}",
    )


def _parts(run: Run, limits: Sequence[Band]) -> Panel:
    parts = [
        line(run, "P", "measured", "samples_M", "controller/p"),
        line(run, "I", "part", "samples_M", "controller/i"),
    ]
    drawn = [part for part in parts if part.x]
    return Panel(
        "P and I",
        over_millions(run),
        axis("part of log strength (nats)", [v for part in drawn for v in part.y]),
        drawn,
        bands=limits if drawn else (),
        rules=[Rule(0.0)] if drawn else [],
        missing=None if drawn else "no controller/p in the rows: controller=l0_target on a penalty has P and I",
    )
