"""The loaders: the promised rows in the promised order, on any number of ranks, within the promised memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_cache
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepilot.data import layout, prefetch
from sparsepilot.data.cache import Cache
from sparsepilot.data.loader import TrainLoader, ValLoader
from sparsepilot.data.order import Order
from sparsepilot.data.prefetch import Prefetcher
from sparsepilot.data.window import Windows, window_rows_per_stream
from sparsepilot.errors import ConfigError, DataError

SITES = list(tiny_cache.WIDTHS)


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return tiny_cache.sealed(tmp_path_factory.mktemp("cache") / "c", request.param)


def order(window: int = 40, seed: int = 3, num_streams: int = 8) -> Order:
    return Order(700, 32, num_streams, window, seed)


def rows_of(cache: Cache, rows: np.ndarray, sites: list[str] = SITES) -> torch.Tensor:
    return torch.cat([cache.read(site, 0, 830)[torch.from_numpy(rows)] for site in sites], dim=1)


@given(
    window=st.integers(1, 100),
    seed=st.integers(0, 99),
    per_stream=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    start=st.integers(0, 40),
    sites=st.permutations(SITES) | st.just(SITES[:1]),
    prefetch=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_ranks_and_micro_batches_together_are_the_global_batch(
    cache: Cache, window: int, seed: int, per_stream: int, accumulate: int, start: int, sites: list[str], prefetch: int
) -> None:
    wanted = order(window, seed)
    batch = 8 * per_stream * accumulate
    first = 8 * start
    total = first + 5 * batch + 7  # what does not fill a batch is left out
    for world in (1, 2, 8):
        loaders = [
            TrainLoader(cache, sites, wanted, batch, accumulate, total, first, rank, world, prefetch)
            for rank in range(world)
        ]
        assert [len(loader) for loader in loaders] == [5 * accumulate] * world
        micros = zip(*loaders, strict=True)
        for number in range(5):
            sample = first + number * batch
            parts = [next(micros) for _ in range(accumulate)]
            assert {b.first_sample for ranks in parts for b in ranks} == {sample}
            # [stream, row of the stream] after putting ranks side by side and micro-batches behind each other
            x = torch.cat([torch.cat([b.x_BD for b in ranks]).view(8, per_stream, -1) for ranks in parts], dim=1)
            assert torch.equal(x.flatten(0, 1), rows_of(cache, wanted.batch_rows(sample, batch), sites))
        assert next(micros, None) is None
        assert [loader.fetched for loader in loaders] == [5 * accumulate] * world


def test_a_run_that_begins_later_goes_on_with_the_same_rows(cache: Cache) -> None:
    whole = [b.x_BD for b in TrainLoader(cache, SITES, order(), 16, 1, 3000)]
    assert len(whole) == 187
    for done in (0, 1, 43, 44, 150):
        rest = TrainLoader(cache, SITES, order(), 16, 1, 3000, start_sample=16 * done)
        assert all(torch.equal(a, b.x_BD) for a, b in zip(whole[done:], rest, strict=True))


@pytest.mark.parametrize(
    ("num_rows", "batch", "world"), [(130, 50, 1), (129, 32, 4), (None, 33, 2), (8, 1, 8), (9, 4, 2)]
)
def test_validation_rows_come_once_over_all_ranks(cache: Cache, num_rows: int | None, batch: int, world: int) -> None:
    loaders = [ValLoader(cache, SITES, batch, num_rows, rank, world) for rank in range(world)]
    parts = [[b.x_BD for b in loader] for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1
    assert [len(p) for p in parts] == [len(loader) for loader in loaders]
    assert all(0 < len(x) <= batch for p in parts for x in p)
    x = torch.cat([x for p in parts for x in p])
    assert torch.equal(x, rows_of(cache, np.arange(700, 700 + (num_rows or 130))))


def test_what_does_not_divide_is_refused(cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"batch=40 is not a multiple of num_streams \* accumulate = 8 \* 2 = 16"):
        TrainLoader(cache, SITES, order(), 40, 2, 1000)
    with pytest.raises(ConfigError, match="world size 3 does not divide num_streams=8; allowed: 1, 2, 4, 8"):
        TrainLoader(cache, SITES, order(), 16, 1, 1000, world=3)
    with pytest.raises(ConfigError, match="start_sample=12 is not a multiple of num_streams=8"):
        TrainLoader(cache, SITES, order(), 16, 1, 1000, start_sample=12)
    with pytest.raises(DataError, match="has 700 training rows in chunks of 32, the order is for 699"):
        TrainLoader(cache, SITES, Order(699, 32, 8, 40, 3), 16, 1, 1000)
    with pytest.raises(DataError, match="3 validation rows for 4 ranks"):
        ValLoader(cache, SITES, 16, 3, 0, 4)
    with pytest.raises(
        ConfigError, match="window_mb=0 holds not two rows of 64 bytes per stream; at least 1 is needed"
    ):
        window_rows_per_stream(0, 64, 64)


def test_what_lay_in_memory_before_does_not_matter(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.finfo(tensor.dtype).max if tensor.is_floating_point() else -128)

    wanted = [b.x_BD for b in TrainLoader(cache, SITES, order(), 16, 1, 1600)]
    monkeypatch.setattr(torch, "empty", full)  # an overflow is a warning of numpy's, and warnings are errors
    monkeypatch.setattr(Windows, "_read_ahead", lambda *_: None)  # as when its thread gets no time
    found = [b.x_BD for b in TrainLoader(cache, SITES, order(), 16, 1, 1600)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def reading_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("sparsepilot")]


@pytest.mark.parametrize("how", ["exhausted", "closed", "collected", "never begun"])
def test_no_thread_outlives_its_iterator(cache: Cache, how: str) -> None:
    batches = iter(TrainLoader(cache, SITES, order(), 16, 1, 320))
    if how != "never begun":
        next(batches)
        assert reading_threads()
    if how == "exhausted":
        assert len(list(batches)) == 19
    elif how == "closed":
        batches.close()  # type: ignore[attr-defined]
    del batches
    gc.collect()
    assert not reading_threads()


def test_a_damaged_chunk_is_the_consumers_error(tmp_path: Path) -> None:
    cache = tiny_cache.sealed(tmp_path / "c")
    file = layout.shard_file(cache.path, layout.site_array(SITES[0]), 2)
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    loader = TrainLoader(cache, SITES, order(window=4), 16, 1, 700)
    with pytest.raises(DataError, match=r"array 'activations/model.layers.1', chunk 8 \(rows 256 to 287"):
        list(loader)
    assert not reading_threads()


def test_an_exception_comes_after_the_items_before_it() -> None:
    def produce():  # type: ignore[no-untyped-def]
        yield from range(3)
        raise ZeroDivisionError("in the thread")

    got = []
    with pytest.raises(ZeroDivisionError, match="in the thread"), Prefetcher(produce, 2) as items:
        got.extend(items)
    assert got == [0, 1, 2]


def test_read_ahead_is_bounded() -> None:
    taken, ahead, four_made = [0], [], threading.Event()

    def produce():  # type: ignore[no-untyped-def]
        for i in range(200):
            ahead.append(i - taken[0])
            if i == 3:
                four_made.set()
            yield i

    with Prefetcher(produce, 3) as items:
        assert four_made.wait(60)  # reads ahead unasked
        for i in range(200):
            taken[0] += 1
            assert next(items) == i
    assert max(ahead) == 3  # three wait, one more waits for room


def test_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, asked = [100.0], threading.Event()

    def clock() -> float:
        asked.set()
        return now_s[0]

    def slow():  # type: ignore[no-untyped-def]
        assert asked.wait(60)  # the consumer has looked at its clock and waits
        now_s[0] += 7
        yield 0

    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=clock))
    with Prefetcher(slow, 1) as items:
        assert next(items) == 0
        assert items.waited_s == 7


MEMORY = """
import sys
from sparsepilot.data.cache import Cache
from sparsepilot.data.loader import TrainLoader
from sparsepilot.data.order import Order
from sparsepilot.data.window import Windows, window_rows_per_stream

def peak_mb():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024

cache = Cache(sys.argv[1])
window = window_rows_per_stream(16, 8, 512)
order = Order(cache.num_train_rows, cache.chunk_rows, 8, window, 0)
loader = TrainLoader(cache, ["x"], order, 1024, 1, 2 * cache.num_train_rows)
assert loader.window_bytes <= 16 * 2**20
batches = iter(loader)
before = peak_mb()
num_rows = sum(len(b.x_BD) for b in batches)
print(num_rows * 512 / 2**20, peak_mb() - before)
"""


def test_memory_stays_within_the_window(tmp_path: Path) -> None:
    """Reads 80 MB twice through a window of 16 MB, in a process whose peak resident memory is then looked up."""
    from sparsepilot.data.plan import CachePlan
    from sparsepilot.data.writer import CacheWriter, create, seal

    plan = CachePlan(160_000, 0, {"x": 256}, "bfloat16", 512, 65536)
    create(tmp_path / "c", plan)
    writer = CacheWriter(tmp_path / "c")
    for rows in writer.pending():
        numbers = np.arange(len(rows))
        writer.write_shard(rows, {"x": torch.full((len(rows), 256), 0.5).bfloat16()}, numbers, numbers, numbers)
    seal(tmp_path / "c")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "c")], capture_output=True, text=True, check=True
    )
    read_mb, grown_mb = map(float, done.stdout.split())
    assert read_mb > 155
    # the window, six batches of half a MB, scratch chunks of a quarter MB in four threads, and the threads' own heaps
    assert grown_mb < 16 + 3 + 1 + 20
