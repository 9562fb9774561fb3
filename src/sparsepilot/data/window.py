"""The rows of one stream that are in memory: one shuffled block, refilled in place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from sparsepilot.data.cache import Cache
from sparsepilot.data.dtypes import as_numpy, row_bytes
from sparsepilot.data.order import Block, Order
from sparsepilot.errors import ConfigError


def window_rows_per_stream(window_mb: int, num_streams: int, widths: Sequence[int], dtype: str) -> int:
    """Rows per stream with which all streams' windows together hold at most `window_mb` MiB of stored rows.

    It does not depend on the number of ranks, because the order of rows hangs on it; of R ranks each holds 1/R of it.
    """
    row = sum(row_bytes(width, dtype) for width in widths)
    rows = window_mb * 2**20 // (num_streams * row)
    if rows < 1:
        need = -(-num_streams * row // 2**20)
        raise ConfigError(
            f"window_mb={window_mb} holds not one row of {row} bytes per stream; at least {need} is needed"
        )
    return rows


class StreamWindow:
    """Gives the rows of one stream in order, holding one block of it.

    A block is dropped before the next one is read into the same memory, so a window never holds more than
    min(w, n_s) rows, whatever is being read. Blocks are read as whole slabs, rows are picked in memory.
    """

    def __init__(self, cache: Cache, sites: Sequence[str], order: Order, stream: int, pool: Executor) -> None:
        self._cache = cache
        self._order = order
        self._stream = stream
        self._pool = pool
        capacity = min(order.window_rows_per_stream, order.stream_rows(stream))
        self._memory = {site: cache.empty(site, capacity) for site in sites}
        self._scales = {site: torch.empty(capacity) for site in sites} if cache.dtype == "int8" else {}
        self._block: Block | None = None
        self._shuffle = np.empty(0, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of stored rows that this window can hold."""
        return sum(m.nbytes for m in (*self._memory.values(), *self._scales.values()))

    def take(self, start: int, out_BD: Tensor) -> None:
        """Fills `out_BD` with the stream's rows from number `start` on, the sites side by side."""
        done = 0
        while done < len(out_BD):
            block = self._hold(start + done)
            count = min(len(out_BD) - done, block.stop - start - done)
            place = start + done - block.start
            self._gather(self._shuffle[place : place + count], out_BD[done : done + count])
            done += count

    def _gather(self, which_B: np.ndarray, out_BD: Tensor) -> None:
        # numpy, not torch.index_select: that one starts two OpenMP threads for these 70 KB, and where the cores are
        # busy (training!) each waits at the barrier for the other; 30 times slower was seen. One thread is enough.
        column = 0
        for site, memory_ND in self._memory.items():
            width = memory_ND.shape[1]
            target_BD = out_BD[:, column : column + width]
            if self._scales:
                code_BD = memory_ND.numpy()[which_B]
                np.multiply(code_BD, self._scales[site].numpy()[which_B, None], out=target_BD.numpy())
            elif target_BD.is_contiguous():
                np.take(as_numpy(memory_ND), which_B, axis=0, out=as_numpy(target_BD), mode="clip")
            else:
                as_numpy(target_BD)[:] = as_numpy(memory_ND)[which_B]
            column += width

    def _read_slab(self, slab: tuple[int, int], place: int) -> None:
        first, last = slab
        where = slice(place, place + last - first)
        for site, memory_ND in self._memory.items():
            self._cache.read_into(site, first, memory_ND[where])
            if self._scales:
                self._cache.read_scales_into(site, first, self._scales[site][where])

    def _hold(self, t: int) -> Block:
        if self._block is None or not self._block.start <= t < self._block.stop:
            self._block = None  # a failed read must not leave half a block that looks like a whole one
            block = self._order.block_at(self._stream, t)
            slabs = self._order.slabs(block)
            places = itertools.accumulate((last - first for first, last in slabs), initial=0)
            # list() waits for all of them and raises the first error
            list(self._pool.map(self._read_slab, slabs, places))
            self._shuffle = self._order.shuffle(block)
            self._block = block
        return self._block
