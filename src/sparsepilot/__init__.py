"""Sparse autoencoders on language-model activations, trained in closed loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from sparsepilot.interop.dictionary import Dictionary

__version__ = "0.1.0"


def load(path: str | Path) -> Dictionary:
    """A trained autoencoder from a run folder, as a plain module with `encode`, `decode`, `W_enc`, `W_dec` and `cfg`.

    Needs torch and safetensors only. Raises CheckpointError when the files are missing or damaged.
    """
    from sparsepilot.interop.dictionary import load

    return load(path)
