"""Runs a language model over packed contexts and yields the activations of any range of rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm.capture import capture, expand_sites, site_widths
from sparsepilot.lm.load import LanguageModel
from sparsepilot.lm.pack import Packed

__all__ = ["Block", "describe", "expand_sites", "harvest", "site_widths"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Block:
    """n consecutive rows."""

    rows: range
    """Their numbers, as `Packed` counts them."""
    x: dict[str, Tensor]
    """Site -> [n, width of the site], on the CPU, in the dtype asked for."""
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    """[n] place of each row in its context, from 1 on."""
    documents: NDArray[np.int32]


def harvest(
    lm: LanguageModel,
    packed: Packed,
    sites: Sequence[str],
    rows: range | None = None,
    *,
    batch_contexts: int = 8,
    dtype: str | torch.dtype = "float16",
    progress: Callable[[int], None] | None = None,
) -> Iterator[Block]:
    """Yields the rows `rows` (all by default) in order, a batch of contexts at a time.

    Batch j is always contexts [j b, (j + 1) b), whichever range is asked for: the bits of a row depend on the shape of
    the product that made it, so a row has the same bits in every range that holds it. A batch that straddles the ends
    of two ranges is computed for both. `progress` is called with the number of rows done so far.

    Raises ConfigError for a size that does not fit, DataError naming site and row for a value that is not finite, or
    too large for `dtype`.
    """
    rows = range(packed.num_rows) if rows is None else rows
    target = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if target is None or target not in DTYPES.values():
        raise ConfigError(f"data.build.dtype={dtype!r}: right are " + ", ".join(map(repr, DTYPES)))
    if batch_contexts < 1:
        raise ConfigError(f"data.build.batch_contexts={batch_contexts}: at least 1 is needed")
    longest = getattr(lm.model.config, "max_position_embeddings", None)
    if longest is not None and packed.context_length > longest:
        raise ConfigError(f"data.build.context_length={packed.context_length}: {lm.id} takes at most {longest}")
    if rows.step != 1 or rows.start < 0 or rows.stop > packed.num_rows:
        raise DataError(f"rows={rows}: right is a range with step 1 within [0, {packed.num_rows})")
    return _harvest(lm, packed, list(sites), rows, batch_contexts, target, progress)


def _harvest(
    lm: LanguageModel,
    packed: Packed,
    sites: list[str],
    rows: range,
    batch_contexts: int,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None,
) -> Iterator[Block]:
    if not rows:
        return
    first_rows = packed.first_rows
    taker = _Taker(dtype)
    first_context = int(np.searchsorted(first_rows, rows.start, side="right")) - 1
    done = 0
    for c in range(first_context // batch_contexts * batch_contexts, packed.num_contexts, batch_contexts):
        if first_rows[c] >= rows.stop:
            return
        contexts = slice(c, c + batch_contexts)
        flat_N = np.flatnonzero(packed.mask_CL[contexts])
        batch_rows = range(int(first_rows[c]), int(first_rows[c]) + len(flat_N))
        wanted = range(max(batch_rows.start, rows.start), min(batch_rows.stop, rows.stop))
        if not wanted:  # a batch of padding and special tokens
            continue
        flat_N = flat_N[wanted.start - batch_rows.start : wanted.stop - batch_rows.start]
        taker.select(flat_N, wanted.start, lm.device)
        tokens_CL = torch.from_numpy(packed.tokens_CL[contexts].astype(np.int64))
        yield Block(
            rows=wanted,
            x=capture(lm, sites, tokens_CL, taker),
            tokens=packed.tokens_CL[contexts].reshape(-1)[flat_N],
            positions=(flat_N % packed.context_length).astype(np.int32),
            documents=packed.documents_CL[contexts].reshape(-1)[flat_N],
        )
        done += len(wanted)
        if progress is not None:
            progress(done)


class _Taker:
    """Cuts the wanted rows out of a site's tensor and converts them, while the forward pass is at that site."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._flat_N = torch.empty(0, dtype=torch.long)
        self._first_row = 0

    def select(self, flat_N: NDArray[np.int64], first_row: int, device: torch.device) -> None:
        self._flat_N, self._first_row = torch.from_numpy(flat_N).to(device), first_row

    def __call__(self, site: str, x_ND: Tensor) -> Tensor:
        own_ND = x_ND.index_select(0, self._flat_N.to(x_ND.device))
        out_ND = own_ND.to(self._dtype)
        if out_ND.numel():
            least, most = torch.aminmax(
                out_ND
            )  # NaN wins over numbers in both; a tenth of the time of isfinite().all()
            if not (math.isfinite(least.item()) and math.isfinite(most.item())):
                self._refuse(site, own_ND, out_ND)
        return out_ND.cpu()

    def _refuse(self, site: str, own_ND: Tensor, out_ND: Tensor) -> None:
        finite_N = torch.isfinite(own_ND).all(dim=1)
        if not bool(finite_N.all()):
            row = self._first_row + int((~finite_N).nonzero()[0])
            raise DataError(f"site {site!r}: row {row} is NaN or infinite already in the language model")
        row = int((~torch.isfinite(out_ND).all(dim=1)).nonzero()[0])
        largest, most = float(own_ND[row].abs().max()), torch.finfo(self._dtype).max
        name = str(self._dtype).removeprefix("torch.")
        raise DataError(
            f"site {site!r}: row {self._first_row + row} holds {largest:.3g}, and {name} ends at {most:.3g}; "
            "set data.build.dtype=bfloat16"
        )


def describe(lm: LanguageModel, packed: Packed, text: dict[str, Any]) -> dict[str, Any]:
    """JSON values for a cache manifest that name the model, the tokenizer and the text; `text` from `text.describe`.

    Two runs with equal descriptions harvest the same rows in the same order.
    """
    return {
        "model_id": lm.id,
        "model_revision": lm.revision,
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "tokenizer": type(lm.tokenizer).__name__,
        "tokenizer_hash": tokenizer_hash(lm.tokenizer),
        "context_length": packed.context_length,
        "text": text,
        "num_documents": len(packed.document_ids),
        "rows_digest": packed.digest,
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary and special tokens: equal hashes mean that token ids mean the same."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.blake2b(repr((vocabulary, tokenizer.all_special_ids)).encode(), digest_size=16).hexdigest()
