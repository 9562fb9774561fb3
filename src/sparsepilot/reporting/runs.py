"""Reading a run folder for its pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsepilot.errors import ConfigError
from sparsepilot.rows import read_rows, rows_of_trainee
from sparsepilot.run_folder import RunFolder
from sparsepilot.saved import read_config, read_object, read_summary


def finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Run:
    """One dictionary's training, as its folder tells it."""

    name: str
    """the folder; of one of several trainees, its own in there"""
    config: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    """of the end of a budget; empty for a run that has not come to one"""
    timing: Sequence[dict[str, Any]] = ()
    trainee: str | None = None
    """its name, of one of several trainees"""
    cache_fingerprint: str | None = None
    """of the rows that it was trained on; None where run.json does not say it"""

    @property
    def batch(self) -> int:
        """Rows per optimizer step."""
        return int(self.config["batch"])

    @property
    def budget_samples(self) -> int:
        """The budget, in whole batches."""
        return -(-int(self.config["samples"]) // self.batch) * self.batch

    @property
    def ended(self) -> bool:
        """Whether its summary is about the last row: not so while it goes on under a longer budget."""
        return bool(self.summary) and self.summary.get("samples") == self.last("samples")

    @property
    def d_sae(self) -> int:
        """Latents of the dictionary."""
        return int(self.config["model"]["d_sae"])

    def series(self, x: str, y: str, positive: bool = False) -> tuple[list[float], list[float]]:
        """The rows' values of `y` over their `x`; what is not finite is left out, with `positive` also what is <= 0.

        >>> Run("", {}, [{"step": 1, "a": 5}, {"step": 2}, {"step": 3, "a": 0}]).series("step", "a", positive=True)
        ([1], [5])
        """
        found = [(row[x], row[y]) for row in self.rows if finite(row.get(y))]
        kept = [(a, b) for a, b in found if b > 0 or not positive]
        return [a for a, _ in kept], [b for _, b in kept]

    def has(self, key: str) -> bool:
        """Whether any row has it."""
        return any(key in row for row in self.rows)

    def last_of(self, *keys: str) -> list[float] | None:
        """The values of the last row in which all of them are finite, or None.

        >>> Run("", {}, [{"a": 1, "b": 2}, {"a": 3}, {"a": 4, "b": math.nan}]).last_of("a", "b")
        [1, 2]
        """
        rows = ([row.get(key) for key in keys] for row in reversed(self.rows))
        return next((values for values in rows if all(map(finite, values))), None)

    def last(self, key: str) -> Any:
        """Its last value, or None."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)


def read_runs(folder: RunFolder) -> list[Run]:
    """The run of a folder; one for each trainee where it trains several, or the one whose own folder it is.

    Raises:
        ConfigError: where no run lies there, or one of its files is damaged.
    """
    if not folder.exists():
        raise ConfigError(f"run_dir = {folder.path}: there is no run here (no config.yaml)")
    above = RunFolder(folder.path.parent)
    one_of_several = not folder.metrics.exists() and above.exists()
    if one_of_several and folder.path.name in (read_config(above).get("trainees") or {}):
        return [run for run in read_runs(above) if run.trainee == folder.path.name]
    config, rows, timing = read_config(folder), list(read_rows(folder.metrics)), list(read_rows(folder.timing))
    cache = read_object(folder.identity).get("cache_fingerprint") if folder.identity.exists() else None
    names = list(config.get("trainees") or {})
    if not names:
        return [Run(str(folder.path), config, rows, read_summary(folder), timing, cache_fingerprint=cache)]
    runs = []
    for name in names:
        own = folder.of_trainee(name)
        own_rows = list(rows_of_trainee(rows, name, names))
        own_config = read_config(own) if own.exists() else config
        runs.append(Run(str(own.path), own_config, own_rows, read_summary(own), timing, name, cache))
    return runs
