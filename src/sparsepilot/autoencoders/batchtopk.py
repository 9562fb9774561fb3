"""BatchTopK autoencoder (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Unpack

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from sparsepilot.autoencoders.base import Autoencoder, Common
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.step import Dense, Knob, Moment, Response, Selection
from sparsepilot.ops.active import ActiveSet
from sparsepilot.ops.product import EncoderProduct
from sparsepilot.ops.select import density_above, select_above, select_batch_topk


class BatchTopK(Autoencoder):
    """f(x) = the k * rows largest of ReLU(W_enc (x - b_in) + b_enc) over the batch of all ranks, the rest 0

    At inference a latent is active above `threshold`, an average of the smallest value that training let through, so
    that a row's code does not hang on its batch. With gradient accumulation each micro-batch (over all ranks) is a
    batch of its own.

    Args:
        k: active latents per row on average; need not be whole.
        threshold_momentum: what the average keeps of itself in each step.
    """

    architecture = "batchtopk"
    resampled_encoder_scale = 1.0  # latents compete for the k places: a short row never wins one
    measures = ("threshold",)
    threshold: Tensor
    """scalar fp32; below 0 until the first step has been taken"""

    def __init__(
        self,
        blocks: Blocks,
        d_sae: PositiveInt,
        k: PositiveFloat,
        threshold_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(blocks, d_sae, **common)
        self.k = k
        self.threshold_momentum = threshold_momentum
        self.register_buffer("threshold", torch.tensor(-1.0))

    @property
    def knob(self) -> Knob:
        return Knob("k", initial=self.k, low=1 / 16, high=self.d_sae)

    def select(self, product: Callable[..., EncoderProduct], now: Moment) -> Selection | Dense:
        tiles = product()
        if now.inference and float(self.threshold) >= 0:
            if density_above(tiles, self.threshold, self.shard) > self.dense_above:
                return Dense(self.threshold, {"threshold": self.threshold})
            pairs, measures = select_above(tiles, self.threshold), {"threshold": self.threshold}
        else:
            top = select_batch_topk(tiles, now.strength, self.shard)
            pairs, measures = top.pairs, {"threshold": top.smallest}
            if now.strength > self.dense_above * self.d_sae:
                return Dense(top.smallest, measures)
        active = ActiveSet.from_pairs(pairs.rows_P, pairs.ids_P, tiles.num_rows, tiles.num_latents)
        return Selection(active, pairs.values_P, measures=measures)

    def keep(self, pre_BF: Tensor, dense: Dense, now: Moment) -> tuple[Tensor | None, Tensor | None]:
        assert dense.bound is not None
        at_threshold = now.inference and float(self.threshold) >= 0
        # the smallest chosen one must not drop out because this product adds in another order than the selection's
        return (pre_BF > dense.bound if at_threshold else pre_BF >= dense.bound * (1 - 1e-5)), None

    def respond(self, pre: Tensor, at: Callable[[Tensor], Tensor], inner: Tensor | None, now: Moment) -> Response:
        return Response(pre.relu())

    def close_step(self, terms: dict[str, Tensor], now: Moment) -> None:
        first = self.threshold < 0
        kept = torch.where(first, 0.0, self.threshold_momentum)
        self.threshold.copy_(kept * self.threshold + (1 - kept) * terms["threshold"])

    def thresholds(self) -> Tensor:
        return self.threshold.clamp_min(0).expand_as(self.b_enc)

    @torch.no_grad()
    def shift_thresholds_(self, by: float) -> None:
        # k is k in training, wherever the pre-activations lie; below 0 it would count as not known yet
        self.threshold.add_(by).clamp_min_(0)

    def activate(self, pre_BF: Tensor) -> Tensor:
        return pre_BF * (pre_BF > self.threshold.clamp_min(0))

    def inference_config(self, strength: float) -> dict[str, Any]:
        return {**super().inference_config(strength), "k": strength}

    @torch.no_grad()
    def adopt(self, tensors: dict[str, Tensor]) -> None:
        super().adopt(tensors)
        if "threshold" in tensors:
            self.threshold.fill_(float(tensors["threshold"].mean()))

    def inference_tensors(self) -> dict[str, Tensor]:
        return {**super().inference_tensors(), "threshold": self.thresholds()}
