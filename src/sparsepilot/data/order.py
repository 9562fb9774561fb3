"""The order of training rows: a pure function of (seed, position), the same for any number of ranks.

A pass is a permutation of the cache's chunks, read as one sequence of all N rows. Virtual stream s of S owns
[s N // S, (s + 1) N // S) of that sequence in every pass, and goes from one pass to the next without a gap: its
row number t lies in pass t // n_s. Inside a pass a stream is cut into blocks of w rows (the window), each
shuffled as a whole. The first block of stream s is only (s + 1) / S of a window long, so that the streams reach
their next block one after the other instead of all at once.

A batch takes the same number of rows from each stream, so its rows come from S windows at once. How well that mixes:
where rows of one document are alike (rho: share of the variance between documents; m: rows of a document that lie
side by side, at most a chunk), the variance of a mean over B rows is at most 1 + rho m B / W (1 - W / N) times that
of independent rows, with W = S w rows in all windows (block means vary by rho m / w, of which a batch averages S).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsepilot.errors import ConfigError

CHUNKS, _BLOCK, CONTEXTS = 0, 1, 2  # what a random key is for; part of the key, so that no two uses share numbers


class Block(NamedTuple):
    """A run of one stream's rows that is shuffled, and read, as a whole."""

    stream: int
    pass_number: int
    number: int
    """Counted from 0 within the pass"""
    start: int
    """The stream's own row number (over all passes) of the block's first row"""
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Order:
    """The order over rows [0, num_rows) of a cache with chunks of `chunk_rows`. ConfigError on impossible values."""

    num_rows: int
    chunk_rows: int
    num_streams: int
    window_rows_per_stream: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_rows", "chunk_rows", "num_streams", "window_rows_per_stream"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; at least 1 is needed")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}; 0 or more is needed")
        if self.num_streams > self.num_rows:
            raise ConfigError(
                f"num_streams={self.num_streams} is more than the {self.num_rows} training rows; at most that many"
            )

    def stream_rows(self, stream: int) -> int:
        """n_s: rows of one pass that belong to `stream`."""
        first, last = self._stream_range(stream)
        return last - first

    def _stream_range(self, stream: int) -> tuple[int, int]:
        return stream * self.num_rows // self.num_streams, (stream + 1) * self.num_rows // self.num_streams

    def block_at(self, stream: int, t: int) -> Block:
        """The block that holds row number `t` of `stream`."""
        rows = self.stream_rows(stream)
        window = self.window_rows_per_stream
        pass_number, offset = divmod(t, rows)
        first = rows if window >= rows else -(-window * (stream + 1) // self.num_streams)
        if offset < first:
            number, start, stop = 0, 0, first
        else:
            number = 1 + (offset - first) // window
            start = first + (number - 1) * window
            stop = min(start + window, rows)
        base = pass_number * rows
        return Block(stream, pass_number, number, base + start, base + stop)

    def slabs(self, block: Block) -> list[tuple[int, int]]:
        """The block's rows as the fewest contiguous cache ranges [start, stop), ascending."""
        rows = self.stream_rows(block.stream)
        base = self._stream_range(block.stream)[0] - block.pass_number * rows
        begin, end = base + block.start, base + block.stop  # positions in the pass
        chunks, starts = self._chunk_order(block.pass_number)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        low, high = self._chunk_bounds(chunks[first:last])
        high[-1] = low[-1] + end - starts[last - 1]
        low[0] += begin - starts[first]
        ascending = np.argsort(low)
        low, high = low[ascending], high[ascending]
        joined = low[1:] == high[:-1]
        return list(zip(low[np.r_[True, ~joined]].tolist(), high[np.r_[~joined, True]].tolist(), strict=True))

    def shuffle(self, block: Block) -> np.ndarray:
        """Which of the block's rows, counted through its slabs, comes at each place: a permutation, int64."""
        return permutation(block.num_rows, self.seed, _BLOCK, block.pass_number, block.stream, block.number)

    def rows(self, stream: int, start: int, stop: int) -> np.ndarray:
        """Cache rows (int64) of the stream's row numbers [start, stop)."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            block = self.block_at(stream, start)
            end = min(stop, block.stop)
            rows = np.concatenate([np.arange(a, b) for a, b in self.slabs(block)])
            parts.append(rows[self.shuffle(block)[start - block.start : end - block.start]])
            start = end
        return np.concatenate(parts)

    def batch_rows(self, first_sample: int, batch: int) -> np.ndarray:
        """Cache rows (int64) of the `batch` samples from `first_sample` on: streams one after the other.

        Both are multiples of `num_streams`, as each stream gives the same number of rows; else ConfigError.
        """
        start, per_stream = self.per_stream(first_sample, "first_sample"), self.per_stream(batch, "batch")
        return np.concatenate([self.rows(s, start, start + per_stream) for s in range(self.num_streams)])

    def per_stream(self, samples: int, name: str) -> int:
        """`samples` divided by the number of streams; ConfigError, naming the field, when that leaves a rest."""
        if samples % self.num_streams:
            raise ConfigError(f"{name}={samples} is not a multiple of num_streams={self.num_streams}")
        return samples // self.num_streams

    def _chunk_bounds(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row of each of these chunks, and its end."""
        low = chunks * self.chunk_rows
        return low, np.minimum(low + self.chunk_rows, self.num_rows)

    def _chunk_order(self, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        return _chunk_order(self.num_rows, self.chunk_rows, self.seed, pass_number)


@functools.lru_cache(maxsize=4)  # streams are in two passes at most, unless they are tiny
def _chunk_order(num_rows: int, chunk_rows: int, seed: int, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
    """A pass: (chunk numbers in their order, the pass position at which each starts); read-only arrays."""
    num_chunks = -(-num_rows // chunk_rows)
    chunks = permutation(num_chunks, seed, CHUNKS, pass_number)
    starts = np.arange(num_chunks) * chunk_rows
    short_at = int(np.flatnonzero(chunks == num_chunks - 1)[0])
    starts[short_at + 1 :] -= num_chunks * chunk_rows - num_rows  # the last chunk of the cache may be short
    chunks.flags.writeable = starts.flags.writeable = False
    return chunks, starts


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation (int64) that depends on `size` and `key` alone.

    Sorted raw Philox words rather than `Generator.permutation`: numpy promises the raw stream of a bit generator
    for ever, but not what its generator's methods make of it.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(words, kind="stable")
