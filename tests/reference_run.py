"""A run folder whose rows have the shape of the reference runs that the five pictures were specified by."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sparsepilot import schedules

BATCH = 16_384
D_SAE = 16_384
L0_POINTS = ((0.0, 8000.0), (0.125, 200.0), (0.25, 80.0), (0.375, 40.0), (0.5, 20.0), (1.0, 4.0))
LOSS_POINTS = ((1, 14.0), (5, 10.5), (100, 7.0), (1000, 3.5), (10_000, 2.5), (100_000, 2.2))
DEAD_POINTS = ((0.0, 0.0), (0.075, 0.0), (0.3, 1450.0), (0.5, 2900.0), (0.75, 2950.0), (1.0, 3800.0))
STRENGTH_POINTS = ((0.0, 1e-2), (0.12, 1.0), (0.25, 2000.0), (0.26, 50.0), (1.0, 3150.0))
CE_TARGET = 2.3


def write_reference_run(
    path: Path, samples: int = 200_000_000, batch: int = BATCH, log_every_steps: int = 20, **config: Any
) -> Path:
    """L0 8,000 to 4, loss 14 to 2.2, strength up, down and up again, cross-entropy with one spike at the quarter.

    Args:
        config: changes to the configuration, `model={"k": 3}` style.
    """
    path.mkdir(parents=True, exist_ok=True)
    whole = {
        "model": {"_target_": "sparsepilot.autoencoders.jumprelu.JumpReLU", "d_sae": D_SAE},
        "controller": {"_target_": "sparsepilot.controllers.l0_target.L0Target", "target_l0": 4.0, "quality": "ce"},
        "schedule": {"_target_": "sparsepilot.schedules.reference", "scale_to_budget": True},
        "data": {"_target_": "sparsepilot.data.datamodule.ActivationData", "path": "cache/reference"},
        "samples": samples,
        "batch": batch,
        "seed": 0,
        "run_dir": str(path),
    }
    OmegaConf.save(OmegaConf.merge(whole, config), path / "config.yaml")
    noise = random.Random(0)
    total_steps = -(-samples // batch)
    rows: list[dict[str, Any]] = []
    for step in range(1, total_steps + 1):
        clock = {"step": step, "samples": step * batch, "tokens": step * batch}
        done = step / total_steps
        target, strength = _between(L0_POINTS, done, log=True), _between(STRENGTH_POINTS, done, log=True)
        measured = target * math.exp(noise.gauss(0, 0.02))
        ce = CE_TARGET - 0.02 + noise.gauss(0, 0.004) + (0.7 if abs(done - 0.25) < 0.003 else 0.0)
        if step <= 100 or step % log_every_steps == 0 or step == total_steps:
            loss = _between(LOSS_POINTS, step, log=True) * math.exp(noise.gauss(0, 0.03))
            rows.append(clock | {
                "train/loss": loss,
                "train/l0": target * math.exp(noise.gauss(0, 0.04)),
                "train/fvu": 0.05 + 0.4 * done + noise.gauss(0, 0.004),
                "train/dead_latents": round(_between(DEAD_POINTS, done)),
                "train/lr": schedules.reference((step - 1) * batch, samples, scale_to_budget=True),
                "controller/strength": strength,
                "controller/target": target,
                "controller/measured": measured,
                "controller/error": math.log(measured / target),
                "controller/at_limit": int(done < 0.02),
                "controller/p": 0.5 * math.log(measured / target),
                "controller/i": math.log(strength),
                "controller/quality": ce,
                "controller/quality_target": CE_TARGET,
            })  # fmt: skip
        if step % max(1, total_steps // 400) == 0:
            rows.append(clock | {"val/ce": ce, "val/ce_se": 0.01, "controller/quality": ce})
        if step % max(1, total_steps // 20) == 0 or step == total_steps:
            center = 24 * (1 - 0.5 * done)
            histogram = [round(D_SAE * 0.13 * math.exp(-(((i - center + 4) / 3.0) ** 2))) for i in range(24)]
            rows.append(clock | {
                "val/loss": _between(LOSS_POINTS, step, log=True),
                "val/l0": target * math.exp(noise.gauss(0, 0.01)),
                "val/fvu": 0.05 + 0.4 * done,
                "val/mse": 0.1,
                "val/silent_latents": round(0.9 * _between(DEAD_POINTS, done)),
                "val/firing_density_histogram": histogram,
                "val/ce": ce,
            })  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    timing = [{"step": r["step"], "samples": r["samples"], "samples_per_s": 4e4} for r in rows if "train/loss" in r]
    (path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    metrics: dict[str, Any] = {}
    for row in rows:
        metrics |= row
    summary = {"samples": total_steps * batch, "steps": total_steps, "training_s": total_steps * batch / 4e4,
               "samples_per_s": 4e4, "metrics": metrics, "environment": {"torch": "2.13.0", "threads": 2}}  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary, indent=2))
    return path


def _between(points: Sequence[tuple[float, float]], place: float, log: bool = False) -> float:
    """Joined linearly in both, or in the logarithm of the value (and of the place, where that is a step)."""
    if place <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if place <= x1:
            part = math.log(place / x0) / math.log(x1 / x0) if x0 >= 1 else (place - x0) / (x1 - x0)
            return y0 * (y1 / y0) ** part if log else y0 + (y1 - y0) * part
    return points[-1][1]
