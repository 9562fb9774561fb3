"""The few collectives that training needs; each is the identity in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Size of the default process group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 where there is one."""
    return dist.get_rank() if num_ranks() > 1 else 0


def all_reduce_sum_(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if num_ranks() > 1:
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
