"""The rows of each stream that are in memory: one shuffled block in use, the next one being read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sparsepilot.data.dtypes import as_numpy
from sparsepilot.data.order import Block, Order
from sparsepilot.data.source import RowSource
from sparsepilot.errors import ConfigError


def window_rows_per_stream(window_mb: int, num_streams: int, row: int) -> int:
    """Rows of `row` bytes per stream and block with which all streams together hold at most `window_mb` MiB of them.

    A stream holds two blocks, one in use and one being read. It does not depend on the number of ranks, because the
    order of rows hangs on it; of R ranks each holds 1/R of it.
    """
    rows = window_mb * 2**20 // (2 * num_streams * row)
    if rows < 1:
        need = -(-2 * num_streams * row // 2**20)
        raise ConfigError(
            f"window_mb={window_mb} holds not two rows of {row} bytes per stream; at least {need} is needed"
        )
    return rows


class Windows:
    """Gives the rows of several streams in order, holding two blocks of each: one in use, the next being read.

    A block is read, as whole slabs, into the memory of the one before the last, so never more than 2 min(w, n_s) rows
    per stream are held. One thread reads ahead, so that this is spread over the time that the present blocks last, the
    ends of passes included, where all streams reach their next block at once. `close` ends it.
    """

    def __init__(
        self, cache: RowSource, sites: Sequence[str], order: Order, streams: Sequence[int], pool: Executor
    ) -> None:
        self._cache, self._order, self._streams, self._pool = cache, order, streams, pool
        room = [min(order.window_rows_per_stream, order.stream_rows(stream)) for stream in streams]
        self._bases = list(itertools.accumulate((2 * rows for rows in room), initial=0))
        self._memory = {site: cache.empty(site, self._bases[-1]) for site in sites}
        # Zeros: `take` fills the places of streams that cross into a new block with row 0 at first, which may not have
        # been read then, and a scale that is whatever lay in memory overflows, which numpy says in a warning.
        self._scales = {site: torch.zeros(self._bases[-1]) for site in sites if cache.dtype_of(site) == "int8"}
        self._room = room
        self._half = [0] * len(streams)
        self._blocks: list[Block | None] = [None] * len(streams)
        self._places: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(streams)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="sparsepilot-ahead")
        self._next: list[tuple[Block, Future[None]] | None] = [None] * len(streams)
        self._closing = False

    def close(self) -> None:
        """Stops reading ahead."""
        self._closing = True
        self._ahead.shutdown(cancel_futures=True)

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
        for i in crossing:  # after the loop: what is needed now comes first
            self._read_ahead(i)

    def _gather(self, which_B: np.ndarray, out_BD: Tensor) -> None:
        # numpy, not torch.index_select: beside other work on the same two cores that one was seen 30 times slower or
        # more (its OpenMP threads waiting for each other, it seems). One thread is enough.
        column = 0
        for site, memory_ND in self._memory.items():
            width = memory_ND.shape[1]
            target_BD = out_BD[:, column : column + width]
            if site in self._scales:
                code_BD = memory_ND.numpy()[which_B]
                np.multiply(code_BD, self._scales[site].numpy()[which_B, None], out=target_BD.numpy())
            elif memory_ND.dtype != out_BD.dtype:  # beside a site that is stored otherwise
                target_BD.copy_(torch.from_numpy(as_numpy(memory_ND)[which_B]).view(memory_ND.dtype))
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
            self._half[i] = 1 - self._half[i]
            base = self._base(i, self._half[i])
            if not self._was_read_ahead(i, block):
                list(
                    self._pool.map(self._read_slab, *self._slabs(block, base))
                )  # waits for all, raises the first error
            self._places[i] = self._order.shuffle(block) + base
            self._blocks[i] = block
        return block

    def _was_read_ahead(self, i: int, block: Block) -> bool:
        """Whether the block lies in the other half already; waits where it is just being read."""
        ahead, self._next[i] = self._next[i], None
        if ahead is None or ahead[1].cancel():  # not begun: several threads are faster than the one that is behind
            return False
        ahead[1].result()
        return ahead[0] == block

    def _read_ahead(self, i: int) -> None:
        block = self._blocks[i]
        assert block is not None
        following = self._order.block_at(self._streams[i], block.stop)
        base = self._base(i, 1 - self._half[i])
        self._next[i] = following, self._ahead.submit(self._read_block, following, base)

    def _read_block(self, block: Block, base: int) -> None:
        for slab, place in zip(*self._slabs(block, base), strict=True):
            if self._closing:  # nobody will look at this block, and a language model takes its time
                return
            self._read_slab(slab, place)

    def _base(self, i: int, half: int) -> int:
        return self._bases[i] + half * self._room[i]

    def _slabs(self, block: Block, base: int) -> tuple[list[tuple[int, int]], list[int]]:
        """The block's slabs, and the place in memory of each."""
        slabs = self._order.slabs(block)
        return slabs, list(itertools.accumulate((last - first for first, last in slabs[:-1]), initial=base))

    def _read_slab(self, slab: tuple[int, int], place: int) -> None:
        first, last = slab
        where = slice(place, place + last - first)
        rows = {site: memory_ND[where] for site, memory_ND in self._memory.items()}
        self._cache.fill(first, rows, {site: scale_N[where] for site, scale_N in self._scales.items()})
