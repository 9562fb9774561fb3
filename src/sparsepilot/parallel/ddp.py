"""Data parallelism: every rank holds the whole dictionary and reads its own streams; gradients are averaged."""

# no `from __future__ import annotations` here: DDP compares the annotations of its hooks with types, not with text

import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future, collect_all
from torch.nn.parallel import DistributedDataParallel

from sparsepilot.parallel import mesh
from sparsepilot.parallel.collectives import add_pairwise, all_gather
from sparsepilot.parallel.mesh import Group

ONE_PER_PARAMETER_MB = 1e-6


class DataParallel(DDPStrategy):
    """Lightning's DDP with what a dictionary needs.

    - Buffers are not broadcast: that would hide ranks that disagree.
    - Every parameter has a gradient in every step, so nothing searches for those that have none.
    - One message per parameter. DDP lays out its buckets anew after the first backward pass of a process, and in a ring
      of more than two ranks a number's place decides the order in which it is added up: a resumed run would not have
      the bits of an unbroken one. A dictionary has few and large parameters, so there is nothing to gain from larger
      messages.

    Args:
        gradients: number format in which gradients travel: half the bytes in bfloat16, where each rank's gradient, and
            each partial sum on its way, is rounded to eight bits.
    """

    def __init__(self, gradients: Literal["float32", "bfloat16"] = "float32") -> None:
        super().__init__(
            broadcast_buffers=False,
            find_unused_parameters=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=ONE_PER_PARAMETER_MB,
        )
        self.gradients = gradients
        self.reproducible = False
        """gradients are added up in a fixed tree over ranks; `trainer.reproducible`"""

    def _setup_model(self, model: Any) -> DistributedDataParallel:
        with warnings.catch_warnings():
            # torch 2.13 has another name for it that 2.9 does not know
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            return super()._setup_model(model)

    def _register_ddp_hooks(self) -> None:
        """Lightning's own would only do so on CUDA."""
        assert isinstance(self.model, DistributedDataParallel)
        hook = _mean_in_bfloat16 if self.gradients == "bfloat16" else _mean
        self.model.register_comm_hook(mesh.data(), _mean_by_tree if self.reproducible else hook)


def _mean(group: Group, bucket: GradBucket) -> Future[Tensor]:
    """The mean over ranks of each gradient in a bucket."""
    gradients = bucket.gradients()
    bucket.buffer().div_(group.size)

    def mean(_: Any) -> Tensor:
        reduced: Tensor = bucket.buffer()
        return reduced

    return _reduced(gradients, group).then(mean)


def _mean_by_tree(group: Group, bucket: GradBucket) -> Future[Tensor]:
    """The mean, added up by every rank in the same order: the traffic of a gather, and as many gradients in memory as
    there are ranks, of one parameter at a time."""
    for gradient in bucket.gradients():
        gradient.copy_(add_pairwise(all_gather(gradient, group)).div_(group.size))
    buffer = bucket.buffer()
    done: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
    done.set_result(buffer)
    return done


def _mean_in_bfloat16(group: Group, bucket: GradBucket) -> Future[Tensor]:
    """The same, sent as bfloat16; torch's own hook does not do it over gloo."""
    gradients = bucket.gradients()
    sent = [gradient.to(torch.bfloat16).div_(group.size) for gradient in gradients]

    def widen(_: Any) -> Tensor:
        for gradient, received in zip(gradients, sent, strict=True):
            gradient.copy_(received)
        widened: Tensor = bucket.buffer()
        return widened

    return _reduced(sent, group).then(widen)


def _reduced(tensors: list[Tensor], group: Group) -> Future[Any]:
    works = [dist.all_reduce(tensor, group=group.handle, async_op=True) for tensor in tensors]
    return collect_all([work.get_future() for work in works if work is not None])
