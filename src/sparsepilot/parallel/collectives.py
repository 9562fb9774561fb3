"""The few collectives that training needs; each is the identity in a single process."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Size of the default process group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
