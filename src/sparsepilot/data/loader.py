"""Batches for training and validation. The only state is the position on the sample clock, which the caller keeps."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch
from torch import Tensor

from sparsepilot.data.dtypes import batch_dtype
from sparsepilot.data.order import Order
from sparsepilot.data.prefetch import Prefetcher
from sparsepilot.data.source import RowSource
from sparsepilot.data.window import Windows
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.types import Batch


def streams_of_rank(num_streams: int, rank: int, world: int) -> range:
    """The streams that one rank reads: [rank S / world, (rank + 1) S / world).

    ConfigError, naming the world sizes that do, when world does not divide S.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank={rank} of world={world}; ranks go from 0 to {world - 1}")
    if num_streams % world:
        allowed = ", ".join(str(w) for w in range(1, num_streams + 1) if num_streams % w == 0)
        raise ConfigError(f"world size {world} does not divide num_streams={num_streams}; allowed: {allowed}")
    per_rank = num_streams // world
    return range(rank * per_rank, (rank + 1) * per_rank)


READ_THREADS = 4
"""Slabs in flight at once. Warm reads on 2 busy cores did not tell 1, 2 and 4 apart; a slow disk may."""


class _Loader:
    """What both loaders share: batches made by a prefetch thread, and the waiting time."""

    def __init__(self, prefetch_batches: int) -> None:
        self.prefetch_batches = prefetch_batches
        self.waited_s = 0.0
        """Seconds that the consumer has waited for data, over all iterations"""
        self.fetched = 0
        """Batches that the consumer has got, over all iterations"""

    def __iter__(self) -> Iterator[Batch]:
        with Prefetcher(self._batches, self.prefetch_batches) as batches:
            while True:
                before = batches.waited_s
                batch = next(batches, None)
                self.waited_s += batches.waited_s - before
                if batch is None:
                    return
                self.fetched += 1
                yield batch

    def _batches(self) -> Generator[Batch]:
        raise NotImplementedError


class TrainLoader(_Loader):
    """This rank's micro-batches from `start_sample` to `total_samples`, in the given order.

    Micro-batch m of a global batch takes batch / (num_streams accumulate) consecutive rows of each of this rank's
    streams, stream after stream: x_BD is [batch / (world accumulate), sum of widths] in the stored dtype (see
    `batch_dtype`), the sites in the order of `sites`. Batches that do not fit whole into `total_samples` are left out.

    Memory: the windows of this rank's streams (`window_bytes`, filled before the first batch comes) and
    prefetch_batches + 2 micro-batches.

    Raises ConfigError when batch, accumulate, world or start_sample do not divide; DataError on damaged data, from
    the iterator.
    """

    def __init__(
        self,
        cache: RowSource,
        sites: Sequence[str],
        order: Order,
        batch: int,
        accumulate: int,
        total_samples: int,
        start_sample: int = 0,
        rank: int = 0,
        world: int = 1,
        prefetch_batches: int = 4,
    ) -> None:
        super().__init__(prefetch_batches)
        self.streams = streams_of_rank(order.num_streams, rank, world)
        if accumulate < 1 or batch < 1 or batch % (order.num_streams * accumulate):
            unit = order.num_streams * max(1, accumulate)
            near = max(unit, round(batch / unit) * unit)
            raise ConfigError(
                f"batch={batch} is not a multiple of num_streams * accumulate = {order.num_streams} * {accumulate} = "
                f"{unit}; the nearest that is: {near}"
            )
        order.per_stream(start_sample, "start_sample")
        if order.num_rows != cache.num_train_rows or order.chunk_rows != cache.chunk_rows:
            raise DataError(
                f"{cache}: has {cache.num_train_rows} training rows in chunks of {cache.chunk_rows}, the order is "
                f"for {order.num_rows} in chunks of {order.chunk_rows}"
            )
        self.cache, self.sites, self.order = cache, list(sites), order
        self.batch, self.accumulate = batch, accumulate
        self.total_samples, self.start_sample = total_samples, start_sample

    def __len__(self) -> int:
        """Micro-batches from `start_sample` to the end."""
        return max(0, self.total_samples - self.start_sample) // self.batch * self.accumulate

    @property
    def window_bytes(self) -> int:
        """Bytes of stored rows that this rank holds at most."""
        row = sum(self.cache.row_bytes(site) for site in self.sites)
        return sum(2 * min(self.order.window_rows_per_stream, self.order.stream_rows(s)) * row for s in self.streams)

    def cache_rows(self, first_sample: int, micro: int, rows: Sequence[int]) -> list[int]:
        """Cache rows that stand at `rows` of this rank's micro-batch number `micro` of the global batch there."""
        count = self.batch // (self.order.num_streams * self.accumulate)
        start = first_sample // self.order.num_streams + micro * count
        found = []
        for row in rows:
            t = start + row % count
            found.append(int(self.order.rows(self.streams[row // count], t, t + 1)[0]))
        return found

    def _batches(self) -> Generator[Batch]:
        with (
            ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sparsepilot-read") as pool,
            closing(Windows(self.cache, self.sites, self.order, self.streams, pool)) as windows,
        ):
            yield from self._micro_batches(windows)

    def _micro_batches(self, windows: Windows) -> Iterator[Batch]:
        count = self.batch // (self.order.num_streams * self.accumulate)  # rows per stream and micro-batch
        width = sum(self.cache.widths[site] for site in self.sites)
        dtype = batch_dtype(*map(self.cache.dtype_of, self.sites))
        start = self.start_sample // self.order.num_streams
        for micro in range(len(self)):
            x_BD = torch.empty(count * len(self.streams), width, dtype=dtype)
            windows.take(start + micro * count, count, x_BD)
            yield Batch(x_BD, self.start_sample + micro // self.accumulate * self.batch, len(self.streams))


class ValLoader(_Loader):
    """This rank's share of the first `num_rows` validation rows (None: all), in cache order.

    Every row comes exactly once over all ranks, and every rank gives the same number of batches (collectives in a
    validation step would hang otherwise): rank r reads the r-th of `world` equal ranges, cut into equal batches of
    at most `batch` rows on this rank. `first_sample` is the batch's first row among the validation rows.
    """

    def __init__(
        self,
        cache: RowSource,
        sites: Sequence[str],
        batch: int,
        num_rows: int | None = None,
        rank: int = 0,
        world: int = 1,
        prefetch_batches: int = 4,
    ) -> None:
        super().__init__(prefetch_batches)
        self.cache, self.sites = cache, list(sites)
        total = cache.num_val_rows if num_rows is None else min(num_rows, cache.num_val_rows)
        if total < world:
            raise DataError(f"{cache}: {total} validation rows for {world} ranks; each rank needs at least one")
        if batch < 1:
            raise ConfigError(f"val_batch={batch}; at least 1 is needed")
        self.rows = range(rank * total // world, (rank + 1) * total // world)
        self._num_batches = math.ceil(math.ceil(total / world) / batch)

    def __len__(self) -> int:
        return self._num_batches

    def _batches(self) -> Generator[Batch]:
        for i in range(len(self)):
            first = self.rows.start + i * len(self.rows) // len(self)
            last = self.rows.start + (i + 1) * len(self.rows) // len(self)
            offset = self.cache.num_train_rows
            parts: list[Tensor] = [self.cache.read(site, offset + first, offset + last) for site in self.sites]
            yield Batch(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), first)
