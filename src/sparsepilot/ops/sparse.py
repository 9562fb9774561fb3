"""Encoding and decoding at chosen latents only, with sparse exact gradients; a plain dense twin beside each.

The dense work of a training step is the one product that finds the active latents (ops/product.py). Everything after
it touches the P active pairs only: values, reconstruction and all gradients go through `embedding_bag`, which sums
weighted rows of a table without materialising them and in a fixed order. Both weight matrices lie as [F, D], one row a
latent, so that a latent's weights are contiguous.

Where latents read from one of L sites each (a cross-layer transcoder), the input is seen as a table of B * L rows and
each pair points at the row of its own site: `readers` is L, 1 everywhere else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepilot.ops.active import ActiveSet


def table_rows(rows_P: Tensor, ids_P: Tensor, num_latents: int, readers: int) -> Tensor:
    """[P]: the row of the [B * readers, D] input table that each pair reads."""
    if readers == 1:
        return rows_P
    return rows_P * readers + torch.div(ids_P, num_latents // readers, rounding_mode="floor")


def pair_dots(table_TD: Tensor, rows_P: Tensor, weight_FD: Tensor, ids_P: Tensor, offsets_B: Tensor) -> Tensor:
    """[P]: dot product of table row rows[p] with weight row ids[p], without the [P, D] intermediate."""
    # this is what autograd itself calls for the gradient of embedding_bag's weights
    dots_P: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        table_TD.contiguous(), weight_FD, ids_P, offsets_B, rows_P, 0, -1
    )
    return dots_P


def _sum_rows_per_latent(active: ActiveSet, weights_P: Tensor, table_TD: Tensor, readers: int = 1) -> Tensor:
    """[F, D]: for each latent the sum over its pairs of weight * row, i.e. the sparse [F, B] matrix times rows."""
    by_latent = active.by_latent()
    rows_P = by_latent.rows_P
    if readers > 1:
        rows_P = table_rows(rows_P, active.ids_P[by_latent.order_P], active.num_latents, readers)
    return F.embedding_bag(
        rows_P, table_TD, by_latent.offsets_F, mode="sum", per_sample_weights=weights_P[by_latent.order_P]
    )


def _sum_per_latent(active: ActiveSet, values_P: Tensor) -> Tensor:
    """[F]: the sum of each latent's values, in the fixed order of the active set."""
    by_latent = active.by_latent()
    return F.embedding_bag(by_latent.order_P, values_P[:, None], by_latent.offsets_F, mode="sum").squeeze(1)


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_in_D: Tensor,
        pre_P: Tensor,
        active: ActiveSet,
        readers: int,
    ) -> Tensor:
        ctx.save_for_backward(x_BD, W_enc_FD, b_in_D)
        ctx.active, ctx.readers = active, readers
        return pre_P.view_as(pre_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_pre_P,) = grads
        x_BD, W_enc_FD, b_in_D = ctx.saved_tensors
        active: ActiveSet = ctx.active
        readers: int = ctx.readers
        table_TD = (x_BD - b_in_D).view(-1, W_enc_FD.shape[1])
        grad_W_enc_FD = _sum_rows_per_latent(active, grad_pre_P, table_TD, readers)
        grad_b_enc_F = _sum_per_latent(active, grad_pre_P)
        grad_b_in_D = grad_x_BD = None
        if ctx.needs_input_grad[3]:
            # d pre / d b_in = -W_enc[id]; summed over rows first, so that one [F] @ [F, D] product is enough
            grad_b_in_D = -(grad_b_enc_F.view(readers, 1, -1) @ W_enc_FD.view(readers, -1, W_enc_FD.shape[1])).view(-1)
        if ctx.needs_input_grad[0]:
            rows_P = table_rows(active.rows_P, active.ids_P, active.num_latents, readers)
            order_P = torch.sort(rows_P, stable=True).indices  # within a row the sites need not ascend
            counts_T = torch.bincount(rows_P, minlength=table_TD.shape[0])
            grad_x_BD = F.embedding_bag(
                active.ids_P[order_P],
                W_enc_FD,
                torch.cumsum(counts_T, 0) - counts_T,
                mode="sum",
                per_sample_weights=grad_pre_P[order_P],
            ).view_as(x_BD)
        return grad_x_BD, grad_W_enc_FD, grad_b_enc_F, grad_b_in_D, None, None, None


def encode_at(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor,
    pre_P: Tensor,
    active: ActiveSet,
    readers: int = 1,
) -> Tensor:
    """Pre-activations at the active pairs, [P], differentiable in x, W_enc, b_enc and b_in.

    `pre_P` holds their values, already computed by the selection (no gradient flows through it); the gradient is that
    of `(x[row] - b_in) @ W_enc[id] + b_enc[id]`.
    """
    out: Tensor = _EncodeAt.apply(x_BD, W_enc_FD, b_enc_F, b_in_D, pre_P, active, readers)  # type: ignore[no-untyped-call]
    return out


def encode_plain(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor, readers: int = 1) -> Tensor:
    """The dense twin of `encode_at`: all pre-activations, [B, F], in the parameters' dtype under autocast, too."""
    if readers == 1:
        return F.linear(x_BD - b_in_D, W_enc_FD).to(b_enc_F.dtype) + b_enc_F
    x_BLD = (x_BD - b_in_D).view(x_BD.shape[0], readers, -1)
    W_LfD = W_enc_FD.view(readers, -1, W_enc_FD.shape[1])
    return torch.einsum("bld,lfd->blf", x_BLD, W_LfD).reshape(x_BD.shape[0], -1).to(b_enc_F.dtype) + b_enc_F


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes_P: Tensor, W_dec_FD: Tensor, active: ActiveSet) -> Tensor:
        ctx.save_for_backward(codes_P, W_dec_FD)
        ctx.active = active
        return F.embedding_bag(active.ids_P, W_dec_FD, active.offsets_B, mode="sum", per_sample_weights=codes_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out_BD,) = grads
        grad_out_BD = grad_out_BD.contiguous()
        codes_P, W_dec_FD = ctx.saved_tensors
        active: ActiveSet = ctx.active
        grad_codes_P = grad_W_dec_FD = None
        if ctx.needs_input_grad[0]:
            grad_codes_P = pair_dots(grad_out_BD, active.rows_P, W_dec_FD, active.ids_P, active.offsets_B)
        if ctx.needs_input_grad[1]:
            grad_W_dec_FD = _sum_rows_per_latent(active, codes_P, grad_out_BD)
        return grad_codes_P, grad_W_dec_FD, None


def decode_at(codes_P: Tensor, W_dec_FD: Tensor, active: ActiveSet) -> Tensor:
    """Sum over a row's active latents of code * decoder row, [B, D] (without b_dec), differentiable in codes, W_dec."""
    out: Tensor = _DecodeAt.apply(codes_P, W_dec_FD, active)  # type: ignore[no-untyped-call]
    return out


def decode_plain(codes_BF: Tensor, W_dec_FD: Tensor) -> Tensor:
    """The dense twin of `decode_at`: the whole product of dense codes."""
    return (codes_BF @ W_dec_FD).to(W_dec_FD.dtype)


class _AtPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_F: Tensor, active: ActiveSet) -> Tensor:
        ctx.active = active
        return values_F[active.ids_P]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_per_latent(ctx.active, grads[0].contiguous()), None


def at_pairs(values_F: Tensor, active: ActiveSet) -> Tensor:
    """[P]: the value of each pair's latent; its gradient is summed in a fixed order, unlike that of `values_F[ids]`."""
    out: Tensor = _AtPairs.apply(values_F, active)  # type: ignore[no-untyped-call]
    return out
