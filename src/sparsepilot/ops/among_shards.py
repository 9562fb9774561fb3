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
    """For each k: [B, K] bool, which of a shard's candidates are among the k largest of their row over all shards.

    Each shard compares the candidates of all for its share of the rows, and tells each how many of its own stay. So a
    candidate travels once, however many shards there are.
    """
    values_BK = own.values_BK.detach()
    num_rows, num_own = values_BK.shape
    if shard.is_whole and min(ks) >= num_own:
        return [torch.ones_like(values_BK, dtype=torch.bool)] * len(ks)
    share = -(-num_rows // shard.ranks.size)
    # as wide on every shard: one may have fewer candidates than the others; and shares of the rows that are equal
    width = num_own if shard.is_whole else min(max(ks), shard.num_latents)
    missing = (0, width - num_own, 0, share * shard.ranks.size - num_rows)
    padded = torch.nn.functional.pad(values_BK, missing, value=-torch.inf)
    values_SRK = shard.exchange(padded.reshape(-1, share, width))
    counts_kSR = torch.stack([num_kept(values_SRK, k) for k in ks])
    counts_kB = shard.exchange(counts_kSR.transpose(0, 1)).transpose(0, 1).reshape(len(ks), -1)[:, :num_rows]
    order_BK = torch.sort(values_BK, dim=1, descending=True, stable=True).indices
    places_K = torch.arange(num_own, device=values_BK.device, dtype=counts_kB.dtype)
    place_BK = torch.empty_like(order_BK, dtype=counts_kB.dtype).scatter_(1, order_BK, places_K.expand_as(order_BK))
    return [place_BK < counts_B[:, None] for counts_B in counts_kB]


def num_kept(values_SRK: Tensor, k: int) -> Tensor:
    """[S, R] int32: how many of each shard's candidates are among the k largest of a row over all shards; its largest.

    Of equal ones at the k-th place those of the lower shard, so that the shards' choices fit together. A NaN is always
    among them, and makes itself known in the loss.

    Args:
        values_SRK: [S, R, K] candidates of all shards, -inf where one has fewer.
        k: how many.

    >>> num_kept(torch.tensor([[[3.0, 1.0]], [[1.0, 2.0]]]), k=3).tolist()
    [[2], [1]]
    """
    num_shards, num_rows, width = values_SRK.shape
    if k >= num_shards * width:
        return torch.full((num_shards, num_rows), width, dtype=torch.int32, device=values_SRK.device)
    by_row_RC = values_SRK.transpose(0, 1).reshape(num_rows, num_shards * width)
    kth_R1 = torch.topk(by_row_RC, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    larger_SR = (values_SRK > kth_R1).sum(dim=2) + values_SRK.isnan().sum(dim=2)
    equal_SR = (values_SRK == kth_R1).sum(dim=2)
    room_SR = k - larger_SR.sum(dim=0) - (equal_SR.cumsum(dim=0) - equal_SR)
    return (larger_SR + equal_SR.minimum(room_SR.clamp_min(0))).int()


def _descending(top: TopK) -> TopK:
    values_BK, order_BK = torch.sort(top.values_BK, dim=1, descending=True, stable=True)
    return TopK(values_BK, top.ids_BK.gather(1, order_BK))
