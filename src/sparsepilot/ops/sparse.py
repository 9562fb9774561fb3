"""Encoding and decoding at chosen latents only, with sparse exact gradients; a plain dense twin beside each.

The dense work of a training step is the one product that finds the active latents (`x_BD @ W_enc.T`). Everything
after it touches B * K entries: values, reconstruction and all gradients go through `embedding_bag`, which sums weighted
rows of a table without materialising them and in a fixed order. Both weight matrices lie as [F, D], one row a latent,
so that a latent's weights are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepilot.ops.active import ActiveSet


def _row_dots(rows_BD: Tensor, table_FD: Tensor, ids_BK: Tensor) -> Tensor:
    """[B, K]: dot product of row b with table row ids[b, k], without the [B, K, D] intermediate."""
    num_rows, k = ids_BK.shape
    offsets_B = torch.arange(0, num_rows * k, k, device=ids_BK.device)
    bag_of_P = torch.arange(num_rows, device=ids_BK.device).repeat_interleave(k)
    # this is what autograd itself calls for the gradient of embedding_bag's weights
    dots_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_BD.contiguous(), table_FD, ids_BK.reshape(-1), offsets_B, bag_of_P, 0, -1
    )
    return dots_P.view(num_rows, k)  # type: ignore[no-any-return]


def _sum_rows_per_latent(active: ActiveSet, weights_BK: Tensor, rows_BD: Tensor) -> Tensor:
    """[F, D]: for each latent the sum over its pairs of weight * row, i.e. the sparse [F, B] matrix times rows."""
    by_latent = active.by_latent()
    return F.embedding_bag(
        by_latent.rows_P,
        rows_BD,
        by_latent.offsets_F,
        mode="sum",
        per_sample_weights=weights_BK.reshape(-1)[by_latent.order_P],
    )


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor, pre_BK: Tensor, active: ActiveSet
    ) -> Tensor:
        ctx.save_for_backward(x_BD, W_enc_FD, b_dec_D)
        ctx.active = active
        return pre_BK.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_pre_BK,) = grads
        x_BD, W_enc_FD, b_dec_D = ctx.saved_tensors
        active: ActiveSet = ctx.active
        grad_W_enc_FD = _sum_rows_per_latent(active, grad_pre_BK, x_BD - b_dec_D)
        # one-column bags: the per-latent sum in the fixed order of the active set
        grad_b_enc_F = _sum_rows_per_latent(
            active, grad_pre_BK, torch.ones(x_BD.shape[0], 1, dtype=x_BD.dtype, device=x_BD.device)
        ).squeeze(1)
        # d pre / d b_dec = -W_enc[id]; summed over rows first, so that one [F] @ [F, D] product is enough
        grad_b_dec_D = -(grad_b_enc_F @ W_enc_FD)
        grad_x_BD = None
        if ctx.needs_input_grad[0]:
            grad_x_BD = F.embedding_bag(active.ids_BK, W_enc_FD, mode="sum", per_sample_weights=grad_pre_BK)
        return grad_x_BD, grad_W_enc_FD, grad_b_enc_F, grad_b_dec_D, None, None


def encode_at(
    x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor, pre_BK: Tensor, active: ActiveSet
) -> Tensor:
    """Pre-activations at the active latents, [B, K], differentiable in x, W_enc, b_enc and b_dec.

    `pre_BK` holds their values, already computed by the selection (no gradient flows through it); the gradient is that
    of `(x - b_dec) @ W_enc[ids].T + b_enc[ids]`.
    """
    out: Tensor = _EncodeAt.apply(x_BD, W_enc_FD, b_enc_F, b_dec_D, pre_BK, active)  # type: ignore[no-untyped-call]
    return out


def encode_at_plain(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor, ids_BK: Tensor) -> Tensor:
    """The dense twin of `encode_at`: the whole [B, F] product, then a gather."""
    pre_BF = (x_BD - b_dec_D) @ W_enc_FD.T + b_enc_F
    return pre_BF.gather(1, ids_BK)


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes_BK: Tensor, W_dec_FD: Tensor, active: ActiveSet) -> Tensor:
        ctx.save_for_backward(codes_BK, W_dec_FD)
        ctx.active = active
        return F.embedding_bag(active.ids_BK, W_dec_FD, mode="sum", per_sample_weights=codes_BK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out_BD,) = grads
        grad_out_BD = grad_out_BD.contiguous()
        codes_BK, W_dec_FD = ctx.saved_tensors
        active: ActiveSet = ctx.active
        grad_codes_BK = _row_dots(grad_out_BD, W_dec_FD, active.ids_BK)
        grad_W_dec_FD = _sum_rows_per_latent(active, codes_BK, grad_out_BD)
        return grad_codes_BK, grad_W_dec_FD, None


def decode_at(codes_BK: Tensor, W_dec_FD: Tensor, active: ActiveSet) -> Tensor:
    """Sum over the active latents of code * decoder row, [B, D] (without b_dec), differentiable in codes and W_dec."""
    out: Tensor = _DecodeAt.apply(codes_BK, W_dec_FD, active)  # type: ignore[no-untyped-call]
    return out


def decode_at_plain(codes_BK: Tensor, W_dec_FD: Tensor, ids_BK: Tensor) -> Tensor:
    """The dense twin of `decode_at`: codes scattered into [B, F], then the whole product."""
    codes_BF = torch.zeros(codes_BK.shape[0], W_dec_FD.shape[0], dtype=codes_BK.dtype, device=codes_BK.device)
    return codes_BF.scatter_add(1, ids_BK, codes_BK) @ W_dec_FD
