"""Dead latents over training, and the window that makes a latent dead."""

from __future__ import annotations

from sparsepilot.metrics.dead import dead_window_samples
from sparsepilot.reporting.build import absent, line, over_millions
from sparsepilot.reporting.figure import Band, Panel, Picture, axis
from sparsepilot.reporting.runs import Run
from sparsepilot.reporting.ticks import samples_text

PLACE = 4


def draw(run: Run) -> Picture:
    """Count over samples in millions; shaded the first window, before whose end no latent can be dead."""
    window_samples = dead_window_samples(run.budget_samples)
    dead = line(run, "dead", "measured", "samples_M", "train/dead_latents")
    silent = line(run, "silent over a whole pass", "validation", "samples_M", "val/silent_latents", kind="points")
    top = max([10.0, *dead.y, *silent.y])
    window = f"dead window {samples_text(window_samples)} samples"
    return Picture(
        "dead_latents",
        "Dead latents",
        [
            Panel(
                "",
                over_millions(run),
                axis(f"latents (of {run.d_sae:,})", [0.0, top], low=0.0, high=1.05 * top),
                [one for one in (dead, silent) if one.x],
                bands=[Band(0.0, window_samples / 1e6, window)],
                missing=absent(run, "train/dead_latents"),
            )
        ],
    )
