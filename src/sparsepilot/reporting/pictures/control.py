"""What was asked for, what was pressed and what it cost: sparsity, regularization strength, quality."""

from __future__ import annotations

from dataclasses import replace

from sparsepilot.reporting.build import absent, line, over_steps, undrawable, zeros
from sparsepilot.reporting.figure import Line, Panel, Picture, axis
from sparsepilot.reporting.runs import Run

PLACE = 3


def draw(run: Run) -> Picture:
    """Panels over training steps: active / all (log), strength (linear), validation cross-entropy (linear), and the
    quality that the controller holds where that is another."""
    held = _held(run)
    quality = _quality(run, optional=held.missing is None)
    return Picture("control", "Control", [_sparsity(run), _strength(run), quality, held])


def _sparsity(run: Run) -> Panel:
    lines = [
        _as_share(line(run, "training batch", "measured", "step", "train/l0", positive=True), run.d_sae),
        _as_share(line(run, "set point", "set_point", "step", "controller/target", positive=True), run.d_sae),
        # the set point is of held-out rows, as these are
        _as_share(line(run, "validation", "validation", "step", "val/l0", kind="points", positive=True), run.d_sae),
    ]
    values = [v for one in lines for v in one.y]
    notes = zeros(run, "L0", "train/l0", "val/l0")
    return Panel(
        "Sparsity",
        over_steps(run),
        axis("sparsity (active / all)", values, log=True),
        [one for one in lines if one.x],
        notes=notes if values else (),
        missing=None if run.has("train/l0") and values else undrawable(run, "train/l0", notes),
    )


def _as_share(l0: Line, d_sae: int) -> Line:
    return replace(l0, y=[v / d_sae for v in l0.y])


def _strength(run: Run) -> Panel:
    strength = line(run, "strength", "measured", "step", "controller/strength")
    return Panel(
        "Strength",
        over_steps(run),
        axis(knob_label(run), [0.0, *strength.y], low=0.0),
        [strength] if strength.x else [],
        missing=absent(run, "controller/strength"),
    )


def knob_label(run: Run) -> str:
    """What a controller turns: a penalty's coefficient, or k."""
    return "regularization strength" if run.config["model"].get("k") is None else "k (latents per row)"


def _quality(run: Run, optional: bool) -> Panel:
    """Cross-entropy, beside its target where the controller holds it."""
    quality = line(run, "measured", "measured", "step", "val/ce")
    lines = [quality, *([_target(run)] if holds_cross_entropy(run) else [])] if quality.x else []
    return Panel(
        "Cross-entropy",
        over_steps(run),
        axis("validation cross-entropy (nats)", [v for one in lines for v in one.y]),
        [one for one in lines if one.x],
        missing=None if quality.x else "no val/ce in the rows: cross_entropy=spliced measures it",
        optional=optional,
    )


def _held(run: Run) -> Panel:
    """What the controller measures of the quality that it holds, beside its target; left out where that is the
    cross-entropy that the panel before shows."""
    name, lines = "cross-entropy held (nats)" if holds_cross_entropy(run) else "FVU held", []
    if not (holds_cross_entropy(run) and run.has("val/ce")):
        lines = [line(run, "measured", "measured", "step", "controller/quality"), _target(run)]
    lines = [one for one in lines if one.x]
    return Panel(
        "Quality",
        over_steps(run),
        axis(name, [v for one in lines for v in one.y]),
        lines,
        missing=None if lines else "no quality is held beside the cross-entropy",
        optional=True,
    )


def _target(run: Run) -> Line:
    return line(run, "target", "set_point", "step", "controller/quality_target")


def holds_cross_entropy(run: Run) -> bool:
    """Whether the quality that the controller holds is the language model's, not FVU.

    >>> [holds_cross_entropy(Run("", {"controller": {"quality": quality}}, [])) for quality in ("ce_gap", "fvu")]
    [True, False]
    """
    return str((run.config.get("controller") or {}).get("quality")).startswith("ce")
