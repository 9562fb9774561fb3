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


class Windows:
    """Gives the rows of several streams in order, holding one block of each.

    A block is dropped before the stream's next one is read into the same memory, so never more than min(w, n_s) rows
    per stream are held, whatever is being read. Blocks are read as whole slabs, rows are picked in memory.
    """

    def __init__(
        self, cache: Cache, sites: Sequence[str], order: Order, streams: Sequence[int], pool: Executor
    ) -> None:
        self._cache, self._order, self._streams, self._pool = cache, order, streams, pool
        room = [min(order.window_rows_per_stream, order.stream_rows(stream)) for stream in streams]
        self._bases = [0, *itertools.accumulate(room)]
        self._memory = {site: cache.empty(site, self._bases[-1]) for site in sites}
        self._scales = {site: torch.empty(self._bases[-1]) for site in sites} if cache.dtype == "int8" else {}
        self._blocks: list[Block | None] = [None] * len(streams)
        self._places: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(streams)

    def take(self, start: int, count: int, out_BD: Tensor) -> None:
        """Fills `out_BD` with rows number [start, start + count) of each stream, stream after stream."""
        which_B = np.zeros(len(out_BD), dtype=np.int64)
        crossing = []
        for i, block in enumerate(self._blocks):
            if block is not None and block.start <= start and start + count <= block.stop:
                which_B[i * count : (i + 1) * count] = self._places[i][start - block.start :][:count]
            else:
                crossing.append(i)
        if len(crossing) < len(self._blocks):
            self._gather(which_B, out_BD)
        for i in crossing:  # a few streams at most: blocks end at different times
            done = 0
            while done < count:
                block = self._hold(i, start + done)
                step = min(count - done, block.stop - start - done)
                which = self._places[i][start + done - block.start :][:step]
                self._gather(which, out_BD[i * count + done : i * count + done + step])
                done += step

    def _gather(self, which_B: np.ndarray, out_BD: Tensor) -> None:
        # numpy, not torch.index_select: beside other work on the same two cores that one was seen 30 times slower or
        # more (its OpenMP threads waiting for each other, it seems). One thread is enough.
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

    def _hold(self, i: int, t: int) -> Block:
        block = self._blocks[i]
        if block is None or not block.start <= t < block.stop:
            self._blocks[i] = None  # a failed read must not leave half a block that looks like a whole one
            block = self._order.block_at(self._streams[i], t)
            slabs = self._order.slabs(block)
            places = itertools.accumulate((last - first for first, last in slabs), initial=self._bases[i])
            list(self._pool.map(self._read_slab, slabs, places))  # list() waits for all and raises the first error
            self._places[i] = self._order.shuffle(block) + self._bases[i]
            self._blocks[i] = block
        return block

    def _read_slab(self, slab: tuple[int, int], place: int) -> None:
        first, last = slab
        where = slice(place, place + last - first)
        for site, memory_ND in self._memory.items():
            self._cache.read_into(site, first, memory_ND[where])
            if self._scales:
                self._cache.read_scales_into(site, first, self._scales[site][where])
