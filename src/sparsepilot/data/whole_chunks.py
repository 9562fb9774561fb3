"""The order of rows that are made a chunk at a time: chunks of sizes of their own, blocks of whole chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sparsepilot.data.order import CHUNKS, Block, Order, permutation
from sparsepilot.errors import ConfigError

_Pass = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class WholeChunks(Order):
    """An `Order` for rows of which a chunk costs the same, however few of its rows are wanted.

    Chunk c is rows [first_rows[c], first_rows[c + 1]); `chunk_rows` is the largest. Streams own equal ranges of a pass
    to the row, as in any order, but a block is window_rows_per_stream // chunk_rows chunks, one after the other in the
    pass. Only a chunk that lies across the border of two streams is made twice in a pass, once for each.

    Raises ConfigError when the window holds no chunk.
    """

    first_rows: np.ndarray
    """[C + 1] int64, ascending; from 0 to num_rows"""
    _order_of_pass: Callable[[int], _Pass] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = np.diff(self.first_rows)
        assert (self.first_rows[0], self.first_rows[-1]) == (0, self.num_rows)
        assert 1 <= sizes.min() <= sizes.max() == self.chunk_rows
        if self.window_rows_per_stream < self.chunk_rows:
            raise ConfigError(
                f"window_rows_per_stream={self.window_rows_per_stream} holds no chunk of {self.chunk_rows} rows; at "
                "least so many are needed"
            )
        # streams are in two passes at most, unless they are tiny
        object.__setattr__(self, "_order_of_pass", functools.lru_cache(maxsize=4)(self._make_pass))

    def block_at(self, stream: int, t: int) -> Block:
        """The block that holds row number `t` of `stream`."""
        rows = self.stream_rows(stream)
        pass_number, offset = divmod(t, rows)
        begin, end = self._stream_range(stream)
        _, starts = self._chunk_order(pass_number)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        num_chunks = int(np.searchsorted(starts, end, side="left")) - first
        per_block = self.window_rows_per_stream // self.chunk_rows
        lead = num_chunks if per_block >= num_chunks else -(-per_block * (stream + 1) // self.num_streams)
        chunk = int(np.searchsorted(starts, begin + offset, side="right")) - 1 - first
        if chunk < lead:
            number, low, high = 0, 0, lead
        else:
            number = 1 + (chunk - lead) // per_block
            low = lead + (number - 1) * per_block
            high = low + per_block
        start = max(begin, int(starts[first + low]))
        stop = end if high >= num_chunks else int(starts[first + high])
        base = pass_number * rows - begin
        return Block(stream, pass_number, number, base + start, base + stop)

    def _chunk_bounds(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.first_rows[chunks], self.first_rows[chunks + 1]

    def _chunk_order(self, pass_number: int) -> _Pass:
        return self._order_of_pass(pass_number)

    def _make_pass(self, pass_number: int) -> _Pass:
        sizes = np.diff(self.first_rows)
        chunks = permutation(len(sizes), self.seed, CHUNKS, pass_number)
        starts = np.concatenate([[0], np.cumsum(sizes[chunks])[:-1]])
        chunks.flags.writeable = starts.flags.writeable = False
        return chunks, starts
