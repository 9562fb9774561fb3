"""The tables of a report: what each run came to, and in what they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sparsepilot.metrics.dead import dead_window_samples
from sparsepilot.reporting.labels import differences, value_text
from sparsepilot.reporting.runs import Run
from sparsepilot.reporting.ticks import samples_text, with_error


class Table(NamedTuple):
    """Text in rows and columns; the first cell of each row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    runs: Sequence[int | None] | None = None
    """which run each row is about, None for one about none; by default they are in the order of the rows"""


def results(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """One row per run: the last value of what was measured. Columns that no run has are left out."""
    columns = [(head, [text(run) for run in runs]) for head, text in _COLUMNS]
    kept = [(head, cells) for head, cells in columns if any(cells)]
    rows = [[name, *(cells[i] or "-" for _, cells in kept)] for i, name in enumerate(names)]
    return Table(["run", *(head for head, _ in kept)], rows)


def configuration_differences(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """One row per field in which the runs' configurations differ."""
    return Table(["", *names], [[d.field, *map(value_text, d.values)] for d in differences(runs)])


def _metric(key: str, style: str) -> Any:
    def text(run: Run) -> str:
        value = run.last(key)
        return "" if value is None else format(value, style)

    return text


def _samples(run: Run) -> str:
    done = run.last("samples") or 0
    return f"{done:,}" if done >= int(run.config["samples"]) else f"{done:,} of {samples_text(run.budget_samples)}"


def _dead(run: Run) -> str:
    dead = run.last("train/dead_latents")
    return "" if dead is None else f"{dead:,} in {samples_text(dead_window_samples(run.budget_samples))}"


def _cross_entropy(run: Run) -> str:
    """With the standard error of its distance to the clean model's."""
    value = run.last("val/ce")
    return "" if value is None else with_error(value, run.last("val/ce_se"))


def _kl(run: Run) -> str:
    """It is measured at the end of a budget alone."""
    value = run.last("val/kl") if run.ended else None
    return "" if value is None else format(value, ".4f")


def _seconds(run: Run) -> float | None:
    """Of training; of a run that has not ended, or goes on under a longer budget, as far as it has come."""
    if run.ended:
        seconds = run.summary.get("training_s")
        return None if seconds is None else float(seconds)
    return sum(row.get("elapsed_s", 0.0) for row in run.timing) or None


def samples_per_s(run: Run) -> float | None:
    """Of all its training so far."""
    if run.ended:
        return run.summary.get("samples_per_s")
    seconds = _seconds(run)
    return run.timing[-1]["samples"] / seconds if seconds else None


def _speed(run: Run) -> str:
    speed = samples_per_s(run)
    return "" if speed is None else f"{speed:,.0f}"


def _training_time(run: Run) -> str:
    seconds = _seconds(run)
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_COLUMNS = (
    ("L0", _metric("val/l0", ",.4g")),
    ("FVU", _metric("val/fvu", ".4f")),
    ("cross-entropy", _cross_entropy),
    ("CE recovered", _metric("val/ce_recovered", ".3f")),
    ("KL", _kl),
    ("planted recovered", _metric("val/recovery", ".3f")),
    ("dead", _dead),
    ("silent", _metric("val/silent_latents", ",")),
    ("strength", _metric("controller/strength", ",.4g")),
    ("samples", _samples),
    ("samples/s", _speed),
    ("training", _training_time),
)
