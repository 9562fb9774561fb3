"""The few collectives that training needs; each is the identity in a single process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 4096
"""Numbers; so many are cheaper to gather than to care about how they are reduced"""
_alone: list[bool] = [False]


def num_ranks() -> int:
    """Size of the default process group, 1 where there is none."""
    if _alone[-1]:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 where there is one."""
    return dist.get_rank() if num_ranks() > 1 else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this rank is the only one."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def add_pairwise(parts: Sequence[Tensor]) -> Tensor:
    """((a + b) + (c + d)) + ...: the branches of a fixed tree."""
    left = list(parts)
    while len(left) > 1:
        left = [sum(left[i + 1 : i + 2], left[i]) for i in range(0, len(left), 2)]
    return left[0]


def all_reduce_sum_(values: Tensor) -> Tensor:
    """Sum over ranks, in place; of few numbers, in a fixed tree."""
    if num_ranks() > 1 and values.numel() <= SMALL:
        parts = [torch.empty_like(values) for _ in range(num_ranks())]
        dist.all_gather(parts, values.contiguous())
        values.copy_(add_pairwise(parts))
    elif num_ranks() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def all_reduce_max_(values: Tensor) -> Tensor:
    """Elementwise maximum over ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def all_gather_concat(values_N: Tensor) -> Tensor:
    """The ranks' 1-D tensors one after the other, in rank order; they may differ in length."""
    if num_ranks() == 1:
        return values_N
    length = torch.tensor([values_N.numel()], device=values_N.device)
    lengths = [torch.zeros_like(length) for _ in range(num_ranks())]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = values_N.new_zeros(longest)
    padded[: values_N.numel()] = values_N
    parts = [torch.zeros_like(padded) for _ in range(num_ranks())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])
