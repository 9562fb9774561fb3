"""Activations that are made when they are wanted: numbered rows like a cache's, without a cache."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsepilot.data.dtypes import STORED, row_bytes
from sparsepilot.data.files import canonical_json
from sparsepilot.data.order import CONTEXTS, permutation
from sparsepilot.data.statistics import Moments, SiteStats, moments, no_moments, site_stats
from sparsepilot.errors import ConfigError, DataError, nearest
from sparsepilot.lm.harvest import Block, harvest, site_widths
from sparsepilot.lm.load import LanguageModel
from sparsepilot.lm.pack import Packed


class LiveRows:
    """The rows of a packed text, run through the language model when they are read (a `data.source.TextRows`).

    The training contexts are dealt out at random, once, the same for every seed. Batch j of the language model is
    always contexts [j b, (j + 1) b) of them, whoever asks for whichever of its rows: the bits of a row depend on the
    shape of the products that made it and on its place in them, so a row has the same bits in every pass, after a
    resume and on any number of ranks. A chunk of the order is such a batch (`first_rows`), so none is run for a part of
    its rows without need.

    Validation rows are those of the held-out documents from the first on, in their order, in batches of their own; they
    are made when the first of them is read, and kept in memory.

    One pass of the language model runs at a time. On a GPU it runs in a CUDA stream of its own, beside training.

    Args:
        lm: the language model, on its device.
        packed: the text.
        sites: names of submodules, taken in one pass.
        dtype: how rows are stored: float16, bfloat16 or float32.
        batch_contexts: b.
        val_rows: validation rows at most.
        source: what `lm.harvest.describe` says of model and text.

    Raises:
        DataError: for a site that does not exist or gives no vector per token; when rows are read, for values that are
            not finite in `dtype`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        packed: Packed,
        sites: Sequence[str],
        dtype: str,
        batch_contexts: int,
        val_rows: int,
        source: Mapping[str, Any],
    ) -> None:
        self._lm, self._sites, self._dtype, self._batch_contexts = lm, list(sites), dtype, batch_contexts
        self.widths = site_widths(lm, sites)
        self._train, self._held_out = _dealt(packed), _held_out(packed, val_rows)
        self.num_train_rows, self.num_val_rows = self._train.num_rows, min(val_rows, self._held_out.num_rows)
        self.first_rows: NDArray[np.int64] = np.append(
            self._train.first_rows[:-1:batch_contexts], self._train.first_rows[-1]
        )
        """[batches + 1] first row of each batch of the language model, and the end"""
        self.source = {**source, "sites": dict(self.widths), "dtype": dtype, "batch_contexts": batch_contexts}
        self.passes = 0
        """Forward passes of the language model so far"""
        self.moments: dict[str, Moments] = {}
        """Sums over the first training rows; from `measure`, or from an earlier process of the run"""
        self._val: dict[str, Tensor] = {}
        self._val_lock, self._lm_lock = threading.Lock(), threading.Lock()
        self._stream = None
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)  # the weights are there before another stream reads them
            self._stream = torch.cuda.Stream(lm.device)  # type: ignore[no-untyped-call]

    def __str__(self) -> str:
        return f"live activations of {self._lm.id}"

    @property
    def identity(self) -> dict[str, Any]:
        """What the bits of the rows depend on, beside the machine."""
        return {name: self.source[name] for name in DEPENDS_ON}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()

    @property
    def chunk_rows(self) -> int:
        return int(np.diff(self.first_rows).max())

    def dtype_of(self, site: str) -> str:
        self._known(site)
        return self._dtype

    def row_bytes(self, site: str) -> int:
        self._known(site)
        return row_bytes(self.widths[site], self._dtype)

    def measure(self, num_rows: int) -> dict[str, Moments]:
        """Sums over the first `num_rows` training rows, or all, as a cache has them over all of its own.

        The contexts were dealt out at random, so these are a fair sample.
        """
        total = {site: no_moments(width) for site, width in self.widths.items()}
        for block in self._blocks(self._train, range(min(num_rows, self.num_train_rows))):
            total = {site: total[site].plus(moments(x_BD)) for site, x_BD in block.x.items()}
        return total

    def stats(self, site: str) -> SiteStats:
        self._known(site)
        return site_stats(self.moments[site])

    def read(self, site: str, start: int, stop: int) -> Tensor:
        self._known(site)
        first = self.num_train_rows
        if not 0 <= start <= stop <= first + self.num_val_rows or start < first < stop:
            raise DataError(
                f"{self}: rows {start} to {stop} cannot be read: {first} train, {self.num_val_rows} validate"
            )
        if start >= first:
            return self._validation(site)[start - first : stop - first].clone()
        out = {site: self.empty(site, stop - start) for site in self._sites}
        self.fill(start, out, {})
        return out[site]

    def empty(self, site: str, num_rows: int) -> Tensor:
        self._known(site)
        return torch.empty(num_rows, self.widths[site], dtype=STORED[self._dtype].torch_dtype)

    def fill(self, start: int, rows: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        """Fills rows[site] of each site with the training rows from `start` on, one pass of the language model a batch;
        no stored dtype here has scales."""
        num_rows = len(next(iter(rows.values())))
        for block in self._blocks(self._train, range(start, start + num_rows)):
            for site, out_ND in rows.items():
                out_ND[block.rows.start - start : block.rows.stop - start] = block.x[site]

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        packed, flat_N = self._places(start, stop)
        return packed.tokens_CL.reshape(-1)[flat_N]

    def positions(self, start: int, stop: int) -> NDArray[np.int32]:
        packed, flat_N = self._places(start, stop)
        return (flat_N % packed.context_length).astype(np.int32)

    def documents(self, start: int, stop: int) -> NDArray[np.int32]:
        packed, flat_N = self._places(start, stop)
        return packed.documents_CL.reshape(-1)[flat_N]

    def planted_features(self) -> None:
        return None

    def disk_bytes(self) -> int:
        return 0

    def _blocks(self, packed: Packed, rows: range) -> Iterator[Block]:
        """`harvest`, its passes one at a time over all threads."""
        with in_our_words():
            blocks = harvest(
                self._lm, packed, self._sites, rows, batch_contexts=self._batch_contexts, dtype=self._dtype
            )
            while True:
                with self._lm_lock, self._own_stream():
                    block = next(blocks, None)
                    self.passes += block is not None
                if block is None:
                    return
                yield block

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _validation(self, site: str) -> Tensor:
        with self._val_lock:
            if not self._val:
                blocks = list(self._blocks(self._held_out, range(self.num_val_rows)))
                self._val = {name: torch.cat([block.x[name] for block in blocks]) for name in self._sites}
        return self._val[site]

    def _places(self, start: int, stop: int) -> tuple[Packed, NDArray[np.int64]]:
        """The packed text that holds these rows, and their places in it, counted through all contexts."""
        packed = self._train
        if start >= self.num_train_rows:
            packed, start, stop = self._held_out, start - self.num_train_rows, stop - self.num_train_rows
        first = int(np.searchsorted(packed.first_rows, start, side="right")) - 1
        last = int(np.searchsorted(packed.first_rows, stop, side="left"))
        flat_N = np.flatnonzero(packed.mask_CL[first:last])[start - packed.first_rows[first] :][: stop - start]
        return packed, flat_N + first * packed.context_length

    def _known(self, site: str) -> None:
        if site not in self.widths:
            raise DataError(f"{self}: no site {site!r} among those of this run; {nearest(site, self.widths)}")


DEPENDS_ON = {
    "model_revision": "the language model's weights are",
    "model_dtype": "the language model runs in",
    "tokenizer_hash": "the tokenizer's hash is",
    "context_length": "data.context_length is",
    "rows_digest": "the text is another, or its documents have other names: the hash of its tokens is",
    "sites": "the sites and their widths are",
    "dtype": "data.dtype is",
    "batch_contexts": "data.batch_contexts is",
}
"""Of `source`, what the bits of the rows depend on, in words."""


def check_same(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """DataError, naming what differs, unless two identities are equal.

    Args:
        here: of this process.
        there: of the process that began the run.
    """
    for name, words in DEPENDS_ON.items():
        if here[name] != there.get(name):
            raise DataError(
                f"data=live: {words} {here[name]}, and was {there.get(name)} when this run was begun; its rows would "
                "be others: restore what it was, or begin anew with resume=never"
            )


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Errors of harvesting name the fields of a cache's recipe, `data.build.dtype`; here they are `data.dtype`."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace("data.build.", "data.")) from error


def _dealt(packed: Packed) -> Packed:
    """The training contexts that have rows, in random order."""
    with_rows = np.flatnonzero(packed.mask_CL[: packed.num_train_contexts].any(axis=1))
    return packed.of(with_rows[permutation(len(with_rows), CONTEXTS)])


def _held_out(packed: Packed, num_rows: int) -> Packed:
    """The fewest validation contexts, from the first on, that have so many rows; all where there are not."""
    first = packed.num_train_contexts
    last = np.searchsorted(packed.first_rows, packed.num_train_rows + num_rows, side="left")
    return packed.of(np.arange(first, max(first, min(int(last), packed.num_contexts))))
