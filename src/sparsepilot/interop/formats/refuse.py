"""What all formats refuse alike, with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.interop.dictionary import OWN_TENSORS, Dictionary
from sparsepilot.interop.names import Place, model_of, place_of

KINDS = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder", "cross_layer_transcoder")

Holds = Mapping[str, tuple[str, ...]]
"""For each kind of blocks, the architectures that a format can hold."""


class Names(NamedTuple):
    """How the user calls the places that a dictionary reads and writes, where our names do not say it."""

    hook: str | None = None
    hook_out: str | None = None


class Written(NamedTuple):
    """What an export left, for people."""

    folder: str
    """to load, inside the folder that was asked for; "" is that folder itself"""
    how: str
    """code that loads it there, with {folder} for the path"""
    notes: tuple[str, ...] = ()


def kind_of(cfg: dict[str, Any]) -> str:
    """One of KINDS (an autoencoder with a skip, which nothing here makes, is a kind of its own)."""
    return f"skip_{cfg['blocks']}" if cfg.get("skip") else str(cfg["blocks"])


def check_held(tool: str, holds: Holds, reasons: Mapping[str, str], sae: Dictionary) -> None:
    """Raises ConfigError where the format cannot hold a dictionary; `reasons` by kind or architecture."""
    kind, architecture = kind_of(sae.cfg), sae.cfg["architecture"]
    if kind not in holds:
        why = reasons.get(kind, f"it has no {kind.replace('_', ' ')}s")
        raise ConfigError(f"format = {tool}: cannot hold {kind.replace('_', ' ')}s; {why}")
    if architecture not in holds[kind]:
        why = reasons.get(architecture, f"it can hold {', '.join(holds[kind])} there")
        raise ConfigError(f"format = {tool}: cannot hold {architecture} {kind.replace('_', ' ')}s; {why}")
    if kind != "cross_layer_transcoder":
        for field in ("sites", "sites_out"):
            sites = sae.cfg.get(field) or []
            if len(sites) > 1:
                raise ConfigError(
                    f"format = {tool}: cannot hold a dictionary of {len(sites)} sites ({field}); one only"
                )


def check_thresholds(tool: str, sae: Dictionary) -> None:
    """Raises ConfigError where a threshold below 0 would let negative codes through, which the tool's ReLU does not."""
    if "threshold" in OWN_TENSORS[sae.cfg["architecture"]] and float(sae.threshold.detach().min()) < 0:
        raise ConfigError(
            f"format = {tool}: this dictionary has thresholds below 0, and so negative codes; the tool cuts them at 0"
        )


def sites_of(cfg: dict[str, Any]) -> tuple[str, str]:
    """The site that is read and the one that is written; "" where they are not known."""
    read, write = (next(iter(cfg.get(field) or []), "") for field in ("sites", "sites_out"))
    return read, write or read


def places_of(cfg: dict[str, Any]) -> tuple[Place | None, Place | None]:
    """Where the sites lie, as TransformerLens names them."""
    model = model_of(cfg)
    read, write = sites_of(cfg)
    return place_of(read, model), place_of(write, model)


def positive(cfg: dict[str, Any], field: str, path: Path) -> int:
    """A size from a stranger's configuration.

    Raises:
        CheckpointError: when it is missing or no positive integer.
    """
    value = cfg.get(field)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path}: {field} is {value!r}, a positive integer is needed")
    return value
