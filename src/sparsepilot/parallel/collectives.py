"""The few collectives that training needs; each is the identity in a single process.

Without a `group` they are over the ranks that read different rows (`mesh.data`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsepilot.parallel import mesh
from sparsepilot.parallel.mesh import Group

SMALL = 4096
"""Numbers; so many are cheaper to gather than to care about how they are reduced"""


def num_ranks() -> int:
    """How many ranks read different rows, 1 in a single process."""
    return mesh.data().size


def rank() -> int:
    """This process's number among them, 0 where there is one."""
    return mesh.data().rank


def add_pairwise(parts: Sequence[Tensor]) -> Tensor:
    """((a + b) + (c + d)) + ...: the branches of a fixed tree."""
    left = list(parts)
    while len(left) > 1:
        left = [sum(left[i + 1 : i + 2], left[i]) for i in range(0, len(left), 2)]
    return left[0]


def all_reduce_sum_(values: Tensor, group: Group | None = None) -> Tensor:
    """Sum over ranks, in place; of few numbers, in a fixed tree."""
    group = group or mesh.data()
    if group.size > 1 and values.numel() <= SMALL:
        values.copy_(add_pairwise(all_gather(values, group)))
    elif group.size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group.handle)
    return values


def all_reduce_max_(values: Tensor, group: Group | None = None) -> Tensor:
    """Elementwise maximum over ranks, in place."""
    group = group or mesh.data()
    if group.size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group.handle)
    return values


def all_gather(values: Tensor, group: Group | None = None) -> list[Tensor]:
    """The ranks' tensors, all of one shape, in rank order."""
    group = group or mesh.data()
    if group.size == 1:
        return [values]
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(group.size)]
    dist.all_gather(parts, values.contiguous(), group=group.handle)
    return parts


def all_to_all(values: Tensor, group: Group) -> Tensor:
    """[ranks, ...] what each rank has for this one, of [ranks, ...] what this one has for each."""
    if group.size == 1:
        return values
    received = torch.empty_like(values, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, values.contiguous(), group=group.handle)
    return received


def all_gather_concat(values_N: Tensor, group: Group | None = None) -> Tensor:
    """The ranks' 1-D tensors one after the other, in rank order; they may differ in length."""
    group = group or mesh.data()
    if group.size == 1:
        return values_N
    lengths = [int(n) for n in all_gather(torch.tensor([values_N.numel()], device=values_N.device), group)]
    padded = values_N.new_zeros(max(lengths))
    padded[: values_N.numel()] = values_N
    return torch.cat([part[:n] for part, n in zip(all_gather(padded, group), lengths, strict=True)])


class SumForward(torch.autograd.Function):
    """Each rank's part of a sum -> the sum, on every rank, which all of them use alike from there on. So the gradient
    of the sum is the same everywhere, and it is that of each part: backward passes it on."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sum_: Callable[[Tensor], Tensor]) -> Tensor:
        return sum_(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class SumBackward(torch.autograd.Function):
    """A tensor that all ranks hold alike -> the same, for something that each does by its own part. So each rank's
    gradient is a part of the tensor's: backward sums them."""

    @staticmethod
    def forward(ctx: Any, same: Tensor, sum_: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.sum_ = sum_
        return same.view_as(same)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.sum_(grads[0].clone(memory_format=torch.contiguous_format)), None
