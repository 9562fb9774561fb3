"""TopK autoencoder (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Unpack

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from sparsepilot.autoencoders.base import Autoencoder, Common
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.step import Dense, Extra, Knob, Moment, Response, Selection
from sparsepilot.ops.among_shards import among_all, choose_topk
from sparsepilot.ops.product import EncoderProduct
from sparsepilot.ops.select import select_topk
from sparsepilot.ops.topk import topk_grouped

MULTI = 4
"""Multi-TopK's second reconstruction has so many times k latents (Gao et al. 2024, section 5.4; as in sparsify)."""


class TopK(Autoencoder):
    """f(x) = TopK(ReLU(W_enc (x - b_in) + b_enc)),  y_hat = W_dec^T f(x) + b_dec

    loss = ||y - y_hat||^2 + multi_topk * ||y - y_hat_4k||^2, and what the revival adds

    Args:
        k: active latents per row.
        multi_topk: weight of a second reconstruction from 4k latents, which keeps the dictionary useful at other k;
            1/8 in the paper and in sparsify; 0: none.
        anneal_k_from: k at the start, falling linearly to k; None: no annealing.
        anneal_k_fraction: share of the budget over which it falls.
    """

    architecture = "topk"
    resampled_encoder_scale = 1.0  # latents compete for the k places: a short row never wins one

    def __init__(
        self,
        blocks: Blocks,
        d_sae: PositiveInt,
        k: PositiveInt,
        multi_topk: NonNegativeFloat = 0.0,
        anneal_k_from: PositiveInt | None = None,
        anneal_k_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(blocks, d_sae, **common)
        self.k = k
        self.multi_topk = multi_topk
        self.anneal_k_from = anneal_k_from
        self.anneal_k_fraction = anneal_k_fraction
        self.extra_terms = ("multi_topk",) if multi_topk > 0 else ()

    @property
    def knob(self) -> Knob:
        start = self.anneal_k_from
        by = None if start is None else f"model.anneal_k_from = {start}: k falls from it by itself in training"
        return Knob("k", initial=self.k, low=1, high=self.d_sae, steered_by=by, whole=True)

    def select(self, product: Callable[..., EncoderProduct], now: Moment) -> Selection | Dense:
        k, wide = self._sizes(now)
        if wide > self.dense_above * self.d_sae:
            return Dense()
        tiles = product()
        top = select_topk(tiles, min(wide, tiles.num_latents))
        return Selection(*choose_topk(top, wide, tiles.num_latents, self.shard, inner=k if wide > k else None))

    def keep(self, pre_BF: Tensor, dense: Dense, now: Moment) -> tuple[Tensor | None, Tensor | None]:
        k, wide = self._sizes(now)
        top = topk_grouped(pre_BF, min(wide, pre_BF.shape[1]))
        nothing = torch.zeros_like(pre_BF, dtype=torch.bool)
        keep_BF, *inner_BF = (
            nothing.scatter(1, top.ids_BK, kept_BK)
            for kept_BK in among_all(top, [wide, k] if wide > k else [k], self.shard)
        )
        return keep_BF, inner_BF[0] if inner_BF else None

    def respond(self, pre: Tensor, at: Callable[[Tensor], Tensor], inner: Tensor | None, now: Moment) -> Response:
        codes = pre.relu()
        if inner is None:
            extras = (Extra("multi_topk", codes, self.multi_topk, frozen=False),) if self.extra_terms else ()
            return Response(codes, extras=extras)
        return Response(codes * inner, extras=(Extra("multi_topk", codes, self.multi_topk, frozen=False),))

    def activate(self, pre_BF: Tensor) -> Tensor:
        top = topk_grouped(pre_BF, self.k)
        return torch.zeros_like(pre_BF).scatter(1, top.ids_BK, top.values_BK.relu())

    def inference_config(self, strength: float) -> dict[str, Any]:
        return {**super().inference_config(strength), "k": round(strength)}

    def _extra_weights(self) -> tuple[float, ...]:
        return (self.multi_topk,) if self.extra_terms else ()

    def _sizes(self, now: Moment) -> tuple[int, int]:
        """Latents per row in the main reconstruction, and altogether."""
        k = now.strength
        if self.anneal_k_from is not None and not now.inference:
            k = annealed_k(k, self.anneal_k_from, now.samples / (self.anneal_k_fraction * now.total_samples))
        k = min(self.d_sae, max(1, round(k)))
        return k, k if not self.extra_terms or now.inference else min(self.d_sae, MULTI * k)


def annealed_k(k: float, start: float, progress: float) -> float:
    """Falls linearly from `start` to `k` while `progress` goes from 0 to 1; `k` where `start` is less.

    >>> annealed_k(32, 512, 0.5), annealed_k(32, 512, 1.5), annealed_k(32, 8, 0.0)
    (272.0, 32, 32)
    """
    return k if progress >= 1 or start <= k else start + (k - start) * progress
