"""What was asked for, what was pressed and what it cost: sparsity, regularization strength, cross-entropy."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from sparsepilot.reporting.build import absent, line, over_steps
from sparsepilot.reporting.figure import Line, Panel, Picture, axis
from sparsepilot.reporting.runs import Run

PLACE = 3


def draw(run: Run) -> Picture:
    """Three panels over training steps: active / all (log), strength (linear), validation cross-entropy (linear)."""
    return Picture("control", "Control", [_sparsity(run), _strength(run), _quality(run)])


def _sparsity(run: Run) -> Panel:
    lines = [
        _as_share(line(run, "training batch", "measured", "step", "train/l0", positive=True), run.d_sae),
        _as_share(line(run, "set point", "set_point", "step", "controller/target", positive=True), run.d_sae),
    ]
    values = [v for one in lines for v in one.y]
    return Panel(
        "Sparsity",
        over_steps(run),
        axis("sparsity (active / all)", values, log=True),
        [one for one in lines if one.x],
        missing=absent(run, "train/l0"),
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


def _quality(run: Run) -> Panel:
    """Cross-entropy where it is measured; otherwise the quality that the controller holds, if it holds one."""
    target = line(run, "target", "set_point", "step", "controller/quality_target")
    if run.has("val/ce"):
        label, title = "validation cross-entropy (nats)", "Cross-entropy"
        quality = line(run, "measured", "measured", "step", "val/ce")
        if not holds_cross_entropy(run):
            target = replace(target, x=[], y=[])
    else:
        label, title = "quality held (FVU)", "Quality"
        quality = line(run, "measured", "measured", "step", "controller/quality")
    lines = [one for one in (quality, target) if one.x]
    missing = None
    if not quality.x:
        title, label = "Cross-entropy", "validation cross-entropy (nats)"
        missing = "no val/ce in the rows: cross_entropy=spliced measures it"
    return Panel(title, over_steps(run), axis(label, [v for one in lines for v in one.y]), lines, missing=missing)


def holds_cross_entropy(run: Run) -> bool:
    """Whether the quality that the controller holds is the cross-entropy, not FVU: whose values are its own like?

    >>> held = {"step": 1, "val/ce": 2.31, "train/fvu": 0.2}
    >>> [holds_cross_entropy(Run("", {}, [held | {"controller/quality": q}])) for q in (2.3, 0.19)]
    [True, False]
    """
    held, ce, fvu = (run.series("step", key)[1] for key in ("controller/quality", "val/ce", "train/fvu"))
    if not held or not ce:
        return False
    return not fvu or abs(median(held) - median(ce)) < abs(median(held) - median(fvu))
