"""Sparse autoencoders on language-model activations, trained in closed loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from sparsepilot.interop.dictionary import Dictionary

__version__ = "0.1.0"


def load(path: str | Path) -> Dictionary:
    """A trained dictionary as a plain module with `encode`, `decode`, `W_enc`, `W_dec` and `cfg`, for raw activations.

    `path` is a run folder, a folder or file of SAELens, sparsify, dictionary_learning, circuit-tracer or Gemma Scope,
    or a hub id `hf:<owner>/<repository>/<folder or file>`. Needs torch, safetensors and numpy; no file can run code.
    Raises CheckpointError when there is nothing to load or a file is damaged.
    """
    from sparsepilot.interop.load import load

    return load(path)
