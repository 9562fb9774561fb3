"""Tensors that are spread over ranks: what of one lies here, and what all ranks know together.

A parameter that is spread is a DTensor, one that every rank holds is a plain tensor, and each function here takes both:
for a plain tensor it is the identity, and in a single process nothing here does anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from sparsepilot.parallel import mesh
from sparsepilot.parallel.agreement import from_all
from sparsepilot.parallel.collectives import all_reduce_sum_, num_ranks


class Box(NamedTuple):
    """A part of a tensor, dimension by dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where it lies in the whole."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    def overlap(self, other: Box) -> Box:
        """What both hold, where in the whole it lies; of shape 0 in a dimension where they do not meet.

        >>> Box((0, 0), (4, 2)).overlap(Box((3, 0), (3, 2)))
        Box(start=(3, 0), shape=(1, 2))
        """
        starts = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True))
        return Box(starts, tuple(max(0, end - start) for start, end in zip(starts, ends, strict=True)))

    def within(self, other: Box) -> tuple[slice, ...]:
        """Where in `other`, which holds all of it, it lies."""
        return Box(tuple(a - b for a, b in zip(self.start, other.start, strict=True)), self.shape).slices


def box_of(tensor: DTensor) -> Box:
    """The part that lies on this rank.

    Raises:
        TypeError: where it is no box (torch's strided shards, sums that are still to be taken).
    """
    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        raise TypeError(f"{tensor.placements}: only tensors that are sharded or replicated have boxes")
    [chunk] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def own(tensor: Tensor) -> Tensor:
    """The part that lies on this rank, sharing its memory; without a graph."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def rows_of(values: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every rank holds, the rows that belong to those that this rank holds of `like`."""
    if not isinstance(like, DTensor):
        return values
    box = box_of(like)
    return values[box.start[0] : box.start[0] + box.shape[0]]


def sum_over_parts(values: Tensor, like: Tensor) -> Tensor:
    """A few sums over what each rank holds of `like`, as sums over the whole of it; the same bits on every rank."""
    if not isinstance(like, DTensor):
        return values
    return all_reduce_sum_(values / _num_copies(like))


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them together (of gradients), over all ranks."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return torch.nn.utils.get_total_norm(tensors)
    squares = [torch.linalg.vector_norm(own(tensor)).double().square() / _num_copies(tensor) for tensor in tensors]
    return all_reduce_sum_(torch.stack(squares)).sum().sqrt().float()


def scale_down_(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales tensors of this norm to `max_norm` where it is larger, as torch's `clip_grads_with_norm_` does."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([own(tensor) for tensor in tensors], factor)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within it the parameters of a module that FSDP2 has spread are whole on every rank, to be read: one gather.

    (Its own `forward` does that by itself; everything else that reads parameters row by row or as matrices does not.)
    Where parameters are whole anyway, or are never gathered, nothing happens. What is written to them within is lost.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gather_to_first(tensor: Tensor) -> Tensor | None:
    """The whole tensor, on CPU, on rank 0; None on the others, which hold no more than their part. All ranks call."""
    rank = mesh.world().rank
    first = rank == 0
    if not isinstance(tensor, DTensor):
        return tensor.cpu() if first else None
    boxes = from_all(box_of(tensor))
    if not first:
        if boxes.index(boxes[rank]) == rank:  # or an earlier rank sends the same part
            dist.send(own(tensor).contiguous(), dst=0)
        return None
    gathered = torch.empty(tensor.shape, dtype=tensor.dtype)
    for number, box in enumerate(boxes):
        if number == 0:
            gathered[box.slices] = own(tensor).cpu()
        elif boxes.index(box) == number:
            part = torch.empty(box.shape, dtype=tensor.dtype, device=tensor.device)
            dist.recv(part, src=number)
            gathered[box.slices] = part.cpu()
    return gathered


def _num_copies(tensor: Tensor) -> int:
    """How many ranks hold the part that this rank holds."""
    if not isinstance(tensor, DTensor):
        return num_ranks()
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        parts *= size if isinstance(placement, Shard) else 1
    return num_ranks() // parts
