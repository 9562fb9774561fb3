"""The order of rows: every row once per pass, from any position, for any number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepilot.data.order import Order
from sparsepilot.data.whole_chunks import WholeChunks
from sparsepilot.errors import ConfigError


@st.composite
def orders_of_whole_chunks(draw: st.DrawFn) -> WholeChunks:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
    return WholeChunks(
        num_rows=sum(sizes),
        chunk_rows=max(sizes),
        num_streams=draw(st.integers(1, min(12, sum(sizes)))),
        window_rows_per_stream=max(sizes) * draw(st.integers(1, 5)) + draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**70)),
        first_rows=np.cumsum([0, *sizes]),
    )


@st.composite
def orders(draw: st.DrawFn) -> Order:
    num_streams = draw(st.integers(1, 12))
    num_rows = draw(st.integers(num_streams, 400))
    return Order(
        num_rows=num_rows,
        chunk_rows=draw(st.integers(1, 1 + num_rows + 5)),
        num_streams=num_streams,
        window_rows_per_stream=draw(st.integers(1, num_rows + 3)),
        seed=draw(st.integers(0, 2**70)),
    )


@given(orders() | orders_of_whole_chunks(), st.integers(0, 5))
@settings(deadline=None)
def test_every_row_comes_exactly_once_per_pass(order: Order, pass_number: int) -> None:
    seen = [
        order.rows(s, pass_number * order.stream_rows(s), (pass_number + 1) * order.stream_rows(s))
        for s in range(order.num_streams)
    ]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(order.num_rows))


@given(orders() | orders_of_whole_chunks(), st.integers(1, 6), st.integers(1, 8), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_batches_slice_one_unbroken_order(order: Order, per_stream: int, num_batches: int, first: int) -> None:
    """Batches of any size, begun anywhere, also over the borders of blocks and passes, in any division by ranks."""
    streams, batch = order.num_streams, order.num_streams * per_stream
    whole = [order.rows(s, 0, first + per_stream * num_batches) for s in range(streams)]
    for i in range(num_batches):
        start = first + i * per_stream
        rows = order.batch_rows(start * streams, batch)
        expected = [w[start : start + per_stream] for w in whole]
        assert np.array_equal(rows, np.concatenate(expected))


@given(orders(), st.data())
@settings(deadline=None)
def test_a_block_is_whole_slabs_shuffled_inside_its_window(order: Order, data: st.DataObject) -> None:
    stream = data.draw(st.integers(0, order.num_streams - 1))
    t = data.draw(st.integers(0, 3 * order.num_rows))
    block = order.block_at(stream, t)
    assert block.start <= t < block.stop
    assert block.num_rows <= min(order.window_rows_per_stream, order.stream_rows(stream))
    assert block.start // order.stream_rows(stream) == (block.stop - 1) // order.stream_rows(stream)
    slabs = order.slabs(block)
    assert all(a < b for a, b in slabs)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(slabs))  # ascending, all merged
    in_slabs = np.concatenate([np.arange(a, b) for a, b in slabs])
    assert np.array_equal(np.sort(order.rows(stream, block.start, block.stop)), in_slabs)
    # its rows lie in as few chunks as a run of the pass can touch
    assert len(np.unique(in_slabs // order.chunk_rows)) <= (block.num_rows - 2) // order.chunk_rows + 3


@given(orders_of_whole_chunks(), st.data())
@settings(deadline=None)
def test_a_block_of_whole_chunks_cuts_none_but_at_the_ends_of_its_stream(
    order: WholeChunks, data: st.DataObject
) -> None:
    """All blocks of a stream in a pass: in a row, within the window, and together no more chunks than it touches."""
    stream = data.draw(st.integers(0, order.num_streams - 1))
    rows = order.stream_rows(stream)
    t = begin = rows * data.draw(st.integers(0, 3))
    chunks: list[int] = []
    while t < begin + rows:
        block = order.block_at(stream, t)
        assert block.start == t
        assert block == order.block_at(stream, block.stop - 1)
        assert block.num_rows <= min(order.window_rows_per_stream, rows)
        held = np.concatenate([np.arange(a, b) for a, b in order.slabs(block)])
        assert len(held) == block.num_rows
        own = np.unique(np.searchsorted(order.first_rows, held, side="right") - 1)
        assert len(own) <= order.window_rows_per_stream // order.chunk_rows
        chunks += own.tolist()
        t = block.stop
    assert t == begin + rows
    assert len(set(chunks)) == len(chunks)  # none is made twice for one stream
    all_rows = np.concatenate([np.arange(*order.first_rows[c : c + 2]) for c in chunks])
    assert len(all_rows) - rows <= 2 * (order.chunk_rows - 1)  # and what is not the stream's is at its two ends


def test_streams_do_not_refill_at_the_same_time() -> None:
    order = Order(num_rows=64_000, chunk_rows=50, num_streams=16, window_rows_per_stream=320, seed=0)
    stops = [order.block_at(s, 2 * 320).stop % 320 for s in range(16)]
    assert len(set(stops)) == 16
    gaps = np.diff(sorted(stops))
    assert gaps.max() == gaps.min() == 320 // 16


def test_seeds_passes_and_streams_all_differ() -> None:
    def rows(seed: int, stream: int, pass_number: int) -> tuple[int, ...]:
        order = Order(num_rows=800, chunk_rows=10, num_streams=4, window_rows_per_stream=100, seed=seed)
        return tuple(order.rows(stream, pass_number * 200, pass_number * 200 + 50).tolist())

    keys = [(seed, stream, p) for seed in (0, 1, 2**40) for stream in range(4) for p in range(3)]
    assert len({rows(*key) for key in keys}) == len(keys)


def test_the_order_is_for_ever() -> None:
    """A change here would silently break the resume of every running job."""
    order = Order(num_rows=100, chunk_rows=8, num_streams=4, window_rows_per_stream=10, seed=7)
    assert order.batch_rows(40, 12).tolist() == [99, 32, 98, 53, 54, 52, 40, 44, 46, 82, 81, 84]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_streams": 101}, "num_streams=101 is more than the 100 training rows"),
        ({"chunk_rows": 0}, "chunk_rows=0; at least 1"),
        ({"seed": -1}, "seed=-1; 0 or more"),
    ],
)
def test_impossible_orders(change: dict[str, int], message: str) -> None:
    good = {"num_rows": 100, "chunk_rows": 8, "num_streams": 4, "window_rows_per_stream": 10, "seed": 7}
    with pytest.raises(ConfigError, match=message):
        Order(**good | change)
    with pytest.raises(ConfigError, match="batch=6 is not a multiple of num_streams=4"):
        Order(**good).batch_rows(0, 6)
