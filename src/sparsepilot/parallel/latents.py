"""The latents of a dictionary that a rank holds, where the others are on other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Rows

from sparsepilot.errors import ConfigError
from sparsepilot.parallel import mesh
from sparsepilot.parallel.collectives import SumBackward, SumForward, all_gather, all_reduce_sum_, all_to_all
from sparsepilot.parallel.mesh import ONE, Group


class Shard:
    """Latents `first` to `first + num_latents` of `d_sae`; equal shards follow one another in rank order.

    All ranks of the group see the same rows. What is summed over latents (a reconstruction, a penalty, a count) is
    added up over shards; what all latents use alike (b_dec) gets a gradient that is added up. Each is the identity for
    a whole dictionary, so that nobody needs to ask whether it is one.

    Args:
        d_sae: latents of the whole dictionary.
        ranks: among whom they are dealt out.

    Raises:
        ConfigError: where they do not get the same number each.
    """

    def __init__(self, d_sae: int, ranks: Group = ONE) -> None:
        if d_sae % ranks.size:
            raise ConfigError(
                f"model.d_sae = {d_sae}: must be a multiple of {ranks.size}, the ranks that share the latents"
            )
        self.d_sae, self.ranks = d_sae, ranks
        self.num_latents = d_sae // ranks.size
        self.first = ranks.rank * self.num_latents

    @property
    def is_whole(self) -> bool:
        """Whether there are no other shards."""
        return self.ranks.size == 1

    def own(self, whole_F: Tensor) -> Tensor:
        """This shard's part of [d_sae, ...]."""
        return whole_F[self.first : self.first + self.num_latents]

    def ends(self, ends: Sequence[int]) -> list[int]:
        """Where prefixes of the whole dictionary end among these latents: 0 before the first, `num_latents` after the
        last of them."""
        return [min(max(end - self.first, 0), self.num_latents) for end in ends]

    def sum(self, part: Tensor) -> Tensor:
        """The sum over shards, differentiable: each shard's part gets the gradient of the sum."""
        if self.is_whole:
            return part
        total: Tensor = SumForward.apply(part, self.sum_)  # type: ignore[no-untyped-call]
        return total

    def shared(self, same: Tensor) -> Tensor:
        """A tensor that all shards hold alike, for use by these latents: its gradient is summed over shards."""
        if self.is_whole:
            return same
        out: Tensor = SumBackward.apply(same, self.sum_)  # type: ignore[no-untyped-call]
        return out

    def sum_(self, part: Tensor) -> Tensor:
        """The sum over shards, in place, without a graph."""
        return all_reduce_sum_(part, self.ranks)

    def total(self, part: int, device: torch.device) -> int:
        """The sum of a number, which travels by way of a device."""
        return part if self.is_whole else int(self.sum_(torch.tensor([part], device=device)))

    def exchange(self, values: Tensor) -> Tensor:
        """[S, ...]: what each shard has for this one, of what each shard has for each, [S, ...]."""
        return values if self.is_whole else all_to_all(values, self.ranks)

    def gather(self, values: Tensor) -> Tensor:
        """[S, ...]: the shards' tensors, all of one shape."""
        return torch.stack(all_gather(values, self.ranks))


def spread(own_F: Tensor) -> Tensor:
    """A tensor's rows for the latents held here as torch's name for those of all shards, [d_sae, ...]; it shares their
    memory. The tensor itself where nothing is dealt out."""
    grid = mesh.grid()
    if grid is None:
        return own_F
    shape = torch.Size([own_F.shape[0] * mesh.features().size, *own_F.shape[1:]])
    own_F = own_F.detach().contiguous()
    placements = [Replicate(), Rows(0)]
    whole: Tensor = DTensor.from_local(
        own_F, grid, placements, run_check=False, shape=shape, stride=own_F.stride()
    )  # fmt: skip
    return whole
