"""Sparse autoencoders on language-model activations, trained in closed loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import nn

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


def attach(
    model: nn.Module,
    sae: Dictionary,
    site: str | tuple[str, str] | None = None,
    *,
    ablate: Iterable[int] = (),
    scale: Mapping[int, float] | None = None,
    clamp: Mapping[int, float] | None = None,
    keep_error: bool = False,
    skip_tokens: Collection[int] | None = None,
) -> AbstractContextManager[None]:
    """Puts a dictionary's reconstruction in place of a transformers model's activations, for as long as a `with` lasts.

    `ablate` names latents that are set to 0, `scale` those that are multiplied, `clamp` those that are set to a value
    at every position; `keep_error=True` adds what the dictionary does not explain, so that only these edits act. `site`
    is a dotted module path, (read, write) of a transcoder, or None for the dictionary's own. BOS, EOS and padding are
    left alone (`skip_tokens`). Works under `generate`; the model is as it was afterwards. Raises DataError for a site
    that the model lacks, ConfigError for a width or latent that does not fit. `sparsepilot.lm.attach` says more.
    """
    from sparsepilot.lm.attach import attach

    return attach(
        model, sae, site, ablate=ablate, scale=scale, clamp=clamp, keep_error=keep_error, skip_tokens=skip_tokens
    )
