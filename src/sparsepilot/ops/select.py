"""Which latents are active, found tile by tile: local candidates, merged.

Three selections cover every architecture: the k largest of each row, everything above a bound, and the n largest of a
batch (over all ranks). Each walks the tiles of an `EncoderProduct`, so none sees more than a tile at once.

Where the product ran in half precision, a tile holds upper bounds. What lies below the bound with its upper bound is
out for certain; the rest is computed again in fp32, pair by pair, and the choice is made among those values. So
thresholds and BatchTopK are exactly those of fp32 whatever the product ran in. For TopK, k and some more candidates are
computed again; if the k-th of their values is no less than every other upper bound, nobody else can be among the k
largest. Rows where that fails are computed again in full where the product is to be `certain`.

Where the latents are dealt out over ranks, a bound needs nothing more, BatchTopK's n largest are those of all ranks
anyway, and ops/among_shards.py merges the k largest of each row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsepilot.ops.product import U_HALF, EncoderProduct, Workspace
from sparsepilot.ops.topk import GROUP_SIZE, TopK, merge_topk, topk_grouped
from sparsepilot.parallel.collectives import all_gather_concat, all_reduce_max_, all_reduce_sum_
from sparsepilot.parallel.latents import Shard
from sparsepilot.parallel.mesh import everyone

SPARE = 16
"""Candidates beyond k whose fp32 values decide, where a selection need not be certain."""
SPARE_CERTAIN = 32
"""More of them where it must be, so that few rows are in doubt: 0.7% on a trained dictionary (docs/benchmarks.md)."""
MOST_IN_DOUBT = 0.25
"""Above this share of rows in doubt the fp32 product of all rows is the cheaper way."""
SAMPLE_ROWS = 64


class Pairs(NamedTuple):
    """(row, latent) pairs, rows ascending, with their pre-activations."""

    rows_P: Tensor
    ids_P: Tensor
    values_P: Tensor


def select_topk(product: EncoderProduct, k: int) -> TopK:
    """The k largest of each row, in no particular order within the row."""
    if product.half is None:
        return _joined([_topk_of_rows(product, rows, k) for rows in product.row_tiles()])
    found = []
    for rows in product.row_tiles():
        top, in_doubt = _topk_by_bounds(product, rows, k)
        if in_doubt.numel() > MOST_IN_DOUBT * top.ids_BK.shape[0]:
            found.append(select_topk(product.in_full(slice(rows.start, product.num_rows)), k))
            break
        if in_doubt.numel() > 0:
            again = select_topk(product.in_full(in_doubt + rows.start), k)
            top.values_BK[in_doubt], top.ids_BK[in_doubt] = again.values_BK, again.ids_BK
        found.append(top)
    return _joined(found)


def _joined(found: list[TopK]) -> TopK:
    return TopK(torch.cat([f.values_BK for f in found]), torch.cat([f.ids_BK for f in found]))


def _topk_by_bounds(product: EncoderProduct, rows: slice, k: int) -> tuple[TopK, Tensor]:
    """The k largest among the candidates of a tile of rows, and the rows (counted within it) for which there might be
    a larger value elsewhere; none where that need not be known."""
    wide = min(k + (SPARE_CERTAIN if product.certain else SPARE), product.num_latents)
    bounds = _topk_of_rows(product, rows, wide)
    device = bounds.ids_BK.device
    num_rows = rows.stop - rows.start
    offsets_B = torch.arange(0, num_rows * wide, wide, device=device)
    rows_P = torch.arange(rows.start, rows.stop, device=device).repeat_interleave(wide)
    exact_BK = product.exact(rows_P, bounds.ids_BK.reshape(-1), offsets_B).view(num_rows, wide)
    best = torch.topk(exact_BK, k, dim=-1, sorted=False)
    top = TopK(best.values, bounds.ids_BK.gather(1, best.indices))
    if not product.certain or wide == product.num_latents:
        return top, torch.empty(0, dtype=torch.int64, device=device)
    others_B = bounds.values_BK.amin(dim=1).float()
    others_B += 2 * U_HALF * others_B.abs()  # the bound itself was rounded
    return top, (best.values.amin(dim=1) < others_B).nonzero().squeeze(1)


def _topk_of_rows(product: EncoderProduct, rows: slice, wanted: int) -> TopK:
    merged: TopK | None = None
    if product.num_latents == 0:  # a shard without dead latents
        nothing_B0 = product.xc_BD.new_empty(rows.stop - rows.start, 0)
        return TopK(nothing_B0, nothing_B0.long())
    for latents in product.latent_tiles:
        pre = product.tile(rows, latents)
        local = topk_grouped(pre, min(wanted, pre.shape[1]))
        local = TopK(local.values_BK, local.ids_BK + latents.start if latents.start else local.ids_BK)
        merged = local if merged is None else merge_topk(merged, local, wanted)
    assert merged is not None
    return merged


def select_above(product: EncoderProduct, bound: float | Tensor) -> Pairs:
    """Every pair whose value is above `bound` (a number, or a scalar tensor), and every NaN: it has to reach the loss,
    where it is refused, and not vanish."""
    # the upper bounds of a half-precision product were rounded themselves
    lower = bound
    if product.half is not None:
        lower = bound - max(bound, -bound) * (2 * U_HALF) - 1e-30
    found = [_above(product, rows, latents, lower) for rows in product.row_tiles() for latents in product.latent_tiles]
    pairs = Pairs(*(torch.cat(part) for part in zip(*found, strict=True)))
    if len(product.latent_tiles) > 1:  # tiles of one row lie apart
        order_P = torch.sort(pairs.rows_P, stable=True).indices
        pairs = Pairs(*(part[order_P] for part in pairs))
    if product.half is None:
        return pairs
    return _exactly_above(product, pairs, bound)


def _exactly_above(product: EncoderProduct, pairs: Pairs, bound: float | Tensor) -> Pairs:
    counts_B = torch.bincount(pairs.rows_P, minlength=product.num_rows)
    values_P = product.exact(pairs.rows_P, pairs.ids_P, torch.cumsum(counts_B, 0) - counts_B)
    keep_P = (~(values_P <= bound)).nonzero().squeeze(1)
    return Pairs(pairs.rows_P[keep_P], pairs.ids_P[keep_P], values_P[keep_P])


def _above(product: EncoderProduct, rows: slice, latents: slice, bound: float | Tensor) -> Pairs:
    """Most groups of 16 columns hold nothing above the bound: their maximum says so without looking at each entry."""
    pre = product.tile(rows, latents)
    num_rows, width = pre.shape
    if width % GROUP_SIZE:
        rows_P, ids_P = (~(pre <= bound)).nonzero(as_tuple=True)
    else:
        num_groups = width // GROUP_SIZE
        groups_BsG = pre.view(num_rows, GROUP_SIZE, num_groups)
        rows_Q, groups_Q = (~(groups_BsG.amax(dim=1) <= bound)).nonzero(as_tuple=True)
        members_s = torch.arange(0, width, num_groups, device=pre.device)
        flat_Qs = (rows_Q * width + groups_Q)[:, None] + members_s
        hit_P = (~(pre.view(-1)[flat_Qs] <= bound)).view(-1).nonzero().squeeze(1)
        flat_P = flat_Qs.view(-1)[hit_P]
        rows_P = torch.div(flat_P, width, rounding_mode="floor")
        ids_P = flat_P - rows_P * width
    return Pairs(rows_P + rows.start, ids_P + latents.start, pre[rows_P, ids_P].float())


def density_above(product: EncoderProduct, bound: float | Tensor, shard: Shard | None = None) -> float:
    """The share of pairs above `bound` among some of the rows, over all shards: what decides between the sparse and
    the dense path. Rows from all over the batch, whose parts come from different places of the data."""
    num_rows = min(product.num_rows, SAMPLE_ROWS)
    step = product.num_rows // num_rows
    rows = slice(0, num_rows * step, step)
    above = sum(int((~(product.tile(rows, latents) <= bound)).sum()) for latents in product.latent_tiles)
    if shard is not None:
        above = shard.total(above, product.xc_BD.device)
    return above / (num_rows * (product.num_latents if shard is None else shard.d_sae))


class BatchTop(NamedTuple):
    """The n largest positive pre-activations of a batch."""

    pairs: Pairs
    smallest: Tensor
    """scalar: the smallest of them; 0 where fewer than n are positive"""


def select_batch_topk(product: EncoderProduct, per_row: float, shard: Shard | None = None) -> BatchTop:
    """The `per_row` * rows largest pre-activations over the batch of all ranks, of the positive ones; ties all stay.

    Exact: a bound from a sample of rows leaves a few more candidates than wanted, the largest of which are taken; where
    the sample misled (too few candidates), the bound is lowered.
    """
    rows = torch.tensor(product.num_rows, dtype=torch.int64, device=product.xc_BD.device)
    wanted = max(1, round(per_row * int(all_reduce_sum_(rows))))
    # the lowest of all ranks: with bounds of their own, a rank could leave out what the others make room for
    own_per_row = per_row if shard is None else per_row / shard.ranks.size
    bound_1 = torch.tensor([-_sampled_bound(product, own_per_row)], dtype=torch.float64, device=product.xc_BD.device)
    bound = -float(all_reduce_max_(bound_1, everyone()))
    while True:
        pairs = select_above(product, bound)
        count = torch.tensor(pairs.values_P.numel(), dtype=torch.int64, device=product.xc_BD.device)
        if int(all_reduce_sum_(count, everyone())) >= wanted or bound == 0.0:
            break
        bound = bound / 2 if bound > 1e-3 else 0.0
    smallest = _nth_largest(pairs.values_P, wanted)
    keep_P = (~(pairs.values_P < smallest)).nonzero().squeeze(1)
    if keep_P.numel() < pairs.values_P.numel():
        pairs = Pairs(*(part[keep_P] for part in pairs))
    return BatchTop(pairs, smallest)


def _sampled_bound(product: EncoderProduct, per_row: float) -> float:
    """A bound that about a tenth more than `per_row` entries a row exceed, judged by every so-manieth row."""
    step = max(1, product.num_rows // SAMPLE_ROWS)
    # buffers of its own: those of `product` hold operands that are still needed
    sample = EncoderProduct(
        product.xc_BD[::step], product.W_enc_FD, product.bias_F, Workspace(), readers=product.readers
    )
    found = min(sample.num_rows * sample.num_latents, round(1.1 * per_row * sample.num_rows) + 8)
    per_row_most = min(sample.num_latents, max(1, round(8 * per_row)))
    best = select_topk(sample, per_row_most).values_BK.flatten()
    bound = float(torch.topk(best, min(found, best.numel()), sorted=False).values.min())
    return max(0.0, bound)


def _nth_largest(values_P: Tensor, n: int) -> Tensor:
    """The n-th largest over all ranks, 0 where there are fewer."""
    ranks = everyone()
    if ranks.size > 1:
        values_P = all_gather_concat(torch.topk(values_P, min(n, values_P.numel()), sorted=False).values, ranks)
    if values_P.numel() < n:
        return values_P.new_zeros(())
    return torch.topk(values_P, n, sorted=False).values.amin()
