"""Parts of a tensor: cut in one way and put together in another, every number arrives exactly once."""

from __future__ import annotations

from itertools import pairwise, product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepilot.parallel.shards import Box


@st.composite
def cut(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that cover a shape, some of them perhaps of no size."""
    edges = [sorted([0, *draw(st.lists(st.integers(0, n), max_size=3)), n]) for n in shape]
    spans = [[(a, b - a) for a, b in pairwise(edge)] for edge in edges]
    return [Box(tuple(a for a, _ in spans), tuple(n for _, n in spans)) for spans in product(*spans)]


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple))
def test_any_cut_is_read_in_any_other(data: st.DataObject, shape: tuple[int, ...]) -> None:
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    written = {box: whole[box.slices] for box in data.draw(cut(shape))}
    for wanted in data.draw(cut(shape)):
        read, num_read = torch.zeros(wanted.shape), 0
        for box, part in written.items():
            common = wanted.overlap(box)
            read[common.within(wanted)] += part[common.within(box)]
            num_read += torch.Size(common.shape).numel()
        assert num_read == read.numel()
        assert torch.equal(read, whole[wanted.slices])
