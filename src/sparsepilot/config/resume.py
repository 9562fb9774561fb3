"""Whether a run may go on under a changed configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sparsepilot.errors import ConfigError

FREE = ("trainer", "logger", "callbacks", "threads", "run_dir", "resume", "check", "report", "accumulate", "lm", "text",
        "data.path", "data.prefetch_batches", "data.val_batch", "data.build", "data.lm_device", "compile",
        "cross_entropy.kl", "model.half_product", "model.dense_above",
        "model.tile_latents")  # fmt: skip
"""Fields that leave the order of samples and the loss alone, if not always the last bits of a sum (a resume says so). A
moved `data.path` is held to its fingerprint. The rest of `cross_entropy` is not free: a controller may act on what it
measures, and which contexts it measures often hangs on how many make a batch."""
PINNED = ("callbacks.disturb", "lm.dtype")
"""Fields among those that are another run after all."""


class Change(NamedTuple):
    """One field that differs."""

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.was!r} -> {self.now!r}"


def allowed_changes(was: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The differences between a run's configuration and the one that it is started with again.

    Raises:
        ConfigError: naming every difference that would make it another run.
    """
    changes = list(differences(was, now))
    refused = [change for change in changes if not _is_allowed(change)]
    if refused:
        listed = "; ".join(str(change) for change in refused)
        raise ConfigError(
            f"this run was begun with another configuration ({listed}); it can go on only as it was, or "
            "begin anew: set another run_dir, or resume=never"
        )
    return changes


def _is_allowed(change: Change) -> bool:
    if change.field == "samples":
        return bool(change.now >= change.was)
    field = re.sub(r"^trainees\.[^.]+\.", "", change.field)
    return _is_among(field, FREE) and not _is_among(field, PINNED)


def _is_among(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def differences(was: Any, now: Any, prefix: str = "") -> Iterator[Change]:
    """Every field of two configurations that differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(k for k in now if k not in was)]:
            yield from differences(was.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif was != now:
        yield Change(prefix, was, now)
