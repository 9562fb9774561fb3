"""Whether a controller is well: its strength, its error, what its law adds up, and where it stood at a limit."""

from __future__ import annotations

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
    limits = at_limit(*run.series("samples", "controller/at_limit"))
    unnamed = [replace(band, label="") for band in limits]
    panels = [_strength(run, limits), _error(run, unnamed), _parts(run, unnamed)]
    return Picture("controller_health", "Controller", panels)


def at_limit(samples: Sequence[float], flags: Sequence[float]) -> list[Band]:
    """The stretches, in millions of samples, whose rows say that the knob stood at a limit.

    >>> [(b.low, b.high) for b in at_limit([1e6, 2e6, 3e6, 4e6], [0, 1, 1, 0])]
    [(1.0, 3.0)]
    """
    bands: list[Band] = []
    before, open_at = 0.0, None
    for place, flag in zip(samples, flags, strict=True):
        if flag and open_at is None:
            open_at = before
        if not flag and open_at is not None:
            bands.append(Band(open_at / 1e6, before / 1e6, "at a limit"))
            open_at = None
        before = place
    if open_at is not None:
        bands.append(Band(open_at / 1e6, before / 1e6, "at a limit"))
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
