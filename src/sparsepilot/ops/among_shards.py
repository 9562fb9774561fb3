"""The k largest of each row over the shards of a dictionary: local candidates, merged by their values.

Only values travel. Each shard learns which of its own candidates are among the k largest, and nothing of the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsepilot.ops.active import ActiveSet
from sparsepilot.ops.topk import TopK
from sparsepilot.parallel.latents import Shard


class Chosen(NamedTuple):
    """The pairs of a shard that are among the largest of their row."""

    active: ActiveSet
    pre_P: Tensor
    inner_P: Tensor | None
    """[P] bool: which are among the `inner` largest; None: all"""


def choose_topk(own: TopK, k: int, num_latents: int, shard: Shard, inner: int | None = None) -> Chosen:
    """Of the k largest of each row over all shards, those of this one.

    Args:
        own: its k largest of each row, or all that it has.
        k: how many are wanted in all.
        num_latents: that this shard's ids go up to.
        shard: the latents that took part.
        inner: where not None, also says which are among the `inner` <= k largest.
    """
    if shard.is_whole:
        if inner is None or inner >= own.ids_BK.shape[1]:
            return Chosen(ActiveSet.from_topk(own.ids_BK, num_latents), own.values_BK.reshape(-1), None)
        own = _descending(own)
        active = ActiveSet.from_topk(own.ids_BK, num_latents)
        first_K = torch.arange(own.ids_BK.shape[1], device=own.ids_BK.device) < inner
        return Chosen(active, own.values_BK.reshape(-1), first_K.repeat(active.num_rows))
    wanted = [k] if inner is None else [k, inner]
    kept_BK, *inner_BK = among_all(own, wanted, shard)
    rows_P, places_P = kept_BK.nonzero(as_tuple=True)
    active = ActiveSet.from_pairs(rows_P, own.ids_BK[rows_P, places_P], len(own.ids_BK), num_latents)
    return Chosen(active, own.values_BK[rows_P, places_P], inner_BK[0][rows_P, places_P] if inner_BK else None)


def among_all(own: TopK, ks: Sequence[int], shard: Shard) -> list[Tensor]:
    """For each k: [B, K] bool, which of a shard's candidates are among the k largest of their row over all shards."""
    values_BK = own.values_BK.detach()
    if shard.is_whole:
        values_1BK, rank = values_BK[None], 0
    else:
        # as wide on every shard: one may have fewer candidates than the others
        missing = min(max(ks), shard.num_latents) - values_BK.shape[1]
        padded_BK = torch.nn.functional.pad(values_BK, (0, missing), value=-torch.inf)
        values_1BK, rank = shard.gather(padded_BK), shard.ranks.rank
    return [kept(values_1BK, rank, k)[:, : values_BK.shape[1]] for k in ks]


def kept(values_SBK: Tensor, shard: int, k: int) -> Tensor:
    """[B, K] bool: which candidates of one shard are among the k largest of the row over all shards.

    Of equal ones at the k-th place those of the lower shard, so that the shards' choices fit together. A NaN is always
    kept, and makes itself known in the loss.

    Args:
        values_SBK: [S, B, K] candidates of all shards, -inf where one has fewer; at least k of each row are none.
        shard: whose.
        k: how many.

    >>> values = torch.tensor([[[3.0, 1.0]], [[1.0, 2.0]]])
    >>> kept(values, 0, 3), kept(values, 1, 3)
    (tensor([[True, True]]), tensor([[False,  True]]))
    """
    num_shards, num_rows, width = values_SBK.shape
    own_BK = values_SBK[shard]
    if k >= num_shards * width:
        return torch.ones_like(own_BK, dtype=torch.bool)
    by_row_BC = values_SBK.transpose(0, 1).reshape(num_rows, num_shards * width)
    kth_B1 = torch.topk(by_row_BC, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    room_B1 = k - (by_row_BC > kth_B1).sum(dim=1, keepdim=True)
    equal_SBK = values_SBK == kth_B1
    before_B1 = equal_SBK[:shard].sum(dim=(0, 2))[:, None]
    place_BK = before_B1 + equal_SBK[shard].cumsum(dim=1)
    return (own_BK > kth_B1) | (equal_SBK[shard] & (place_BK <= room_B1)) | own_BK.isnan()


def _descending(top: TopK) -> TopK:
    values_BK, order_BK = torch.sort(top.values_BK, dim=1, descending=True, stable=True)
    return TopK(values_BK, top.ids_BK.gather(1, order_BK))
