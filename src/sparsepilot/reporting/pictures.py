"""Pictures of a run, drawn from its folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsepilot.metrics.firing import LOG10_EDGES
from sparsepilot.rows import read_rows
from sparsepilot.run_folder import RunFolder, replacing_path


def draw_overview(folder: RunFolder) -> Path:
    """Loss, unexplained variance, dead latents and firing density of a run; returns the PNG in its folder."""
    rows = list(read_rows(folder.metrics))
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(str(folder.path))

    steps, loss = _series(rows, "step", "train/loss")
    axes[0, 0].semilogx(steps, loss, linewidth=0.8)
    axes[0, 0].set(xlabel="optimizer step", ylabel="training loss")

    samples, fvu = _series(rows, "samples", "train/fvu")
    axes[0, 1].plot(_millions(samples), fvu, linewidth=0.8, label="training batch")
    samples, fvu = _series(rows, "samples", "val/fvu")
    axes[0, 1].plot(_millions(samples), fvu, marker="o", markersize=3, label="validation")
    axes[0, 1].set(xlabel="samples (M)", ylabel="FVU", yscale="log")
    axes[0, 1].legend()

    samples, dead = _series(rows, "samples", "train/dead_latents")
    axes[1, 0].plot(_millions(samples), dead, linewidth=1.0, label="dead (window)")
    samples, silent = _series(rows, "samples", "val/silent_latents")
    axes[1, 0].plot(_millions(samples), silent, marker="o", markersize=3, label="silent over a whole pass")
    axes[1, 0].set(xlabel="samples (M)", ylabel="latents")
    axes[1, 0].set_ylim(bottom=0, top=max(10, axes[1, 0].get_ylim()[1]))
    axes[1, 0].legend()

    histograms = [row["val/firing_density_histogram"] for row in rows if "val/firing_density_histogram" in row]
    if histograms:
        axes[1, 1].stairs(histograms[-1], LOG10_EDGES, fill=True)
    axes[1, 1].set(xlabel="log10 firing density (validation)", ylabel="latents")

    path = folder.path / "overview.png"
    with replacing_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _series(rows: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[Any], list[Any]]:
    points = [(row[x], row[y]) for row in rows if y in row]
    return [p[0] for p in points], [p[1] for p in points]


def _millions(samples: Sequence[int]) -> list[float]:
    return [s / 1e6 for s in samples]
