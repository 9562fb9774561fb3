"""Reading a run folder for its pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from omegaconf import OmegaConf

from sparsepilot.errors import ConfigError
from sparsepilot.rows import read_rows
from sparsepilot.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """One dictionary's training, as its folder tells it."""

    name: str
    """the folder, with the trainee's name where there are several"""
    config: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    """empty for a run that has not ended"""
    timing: Sequence[dict[str, Any]] = ()

    @property
    def batch(self) -> int:
        """Rows per optimizer step."""
        return int(self.config["batch"])

    @property
    def budget_samples(self) -> int:
        """The budget, in whole batches."""
        return -(-int(self.config["samples"]) // self.batch) * self.batch

    @property
    def d_sae(self) -> int:
        """Latents of the dictionary."""
        return int(self.config["model"]["d_sae"])

    def series(self, x: str, y: str, positive: bool = False) -> tuple[list[float], list[float]]:
        """The rows' values of `y` over their `x`; what is not finite is left out, with `positive` also what is <= 0.

        >>> Run("", {}, [{"step": 1, "a": 5}, {"step": 2}, {"step": 3, "a": 0}]).series("step", "a", positive=True)
        ([1], [5])
        """
        found = [(row[x], row[y]) for row in self.rows if isinstance(row.get(y), int | float)]
        kept = [(a, b) for a, b in found if math.isfinite(b) and (b > 0 or not positive)]
        return [a for a, _ in kept], [b for _, b in kept]

    def has(self, key: str) -> bool:
        """Whether any row has it."""
        return any(key in row for row in self.rows)

    def last(self, key: str) -> Any:
        """Its last value, or None."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)


def read_runs(folder: RunFolder) -> list[Run]:
    """The run of a folder; one for each trainee where it trains several.

    Raises:
        ConfigError: where no run lies there.
    """
    if not folder.exists():
        raise ConfigError(f"run_dir = {folder.path}: there is no run here (no config.yaml)")
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder.config)))
    summary = json.loads(folder.summary.read_text(encoding="utf-8")) if folder.summary.exists() else {}
    rows, timing = list(read_rows(folder.metrics)), list(read_rows(folder.timing))
    prefixes = sorted({match[1] for row in rows for key in row if (match := re.fullmatch(r"(.*/)?train/loss", key))},
                      key=lambda prefix: prefix or "")  # fmt: skip
    name = str(folder.path)
    if not any(prefixes):
        return [Run(name, config, rows, summary, timing)]
    return [
        Run(f"{name}: {prefix.rstrip('/')}", config, list(_of_trainee(rows, prefix, prefixes)), summary, timing)
        for prefix in prefixes
        if prefix
    ]


def _of_trainee(
    rows: Sequence[dict[str, Any]], prefix: str, prefixes: Sequence[str | None]
) -> Iterator[dict[str, Any]]:
    """The rows with this trainee's values under their plain keys, and without those of the others."""
    others = tuple(p for p in prefixes if p and p != prefix)
    for row in rows:
        yield {key.removeprefix(prefix): value for key, value in row.items() if not key.startswith(others or ("\0",))}
