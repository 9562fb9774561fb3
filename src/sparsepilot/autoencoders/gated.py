"""Gated autoencoder (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from sparsepilot.autoencoders.base import Common
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.penalised import Penalised
from sparsepilot.autoencoders.step import Extra, Moment, Response


class Gated(Penalised):
    """gate = W_enc (x - b_in) + b_enc,  mag = exp(r_mag) * W_enc (x - b_in) + b_mag,  f = H(gate) * ReLU(mag)

    loss = ||y - y_hat||^2 + coefficient * sum_i ReLU(gate_i) + ||y - y_hat_gate||^2

    y_hat_gate is decoded from ReLU(gate) by a frozen copy of the decoder: the gate learns from it what matters, since
    H passes no gradient.

    Args:
        coefficient: of the L1 on the gate; the knob.
    """

    architecture = "gated"
    extra_terms = ("gate_recon",)
    per_latent = (*Penalised.per_latent, "r_mag", "b_mag")

    def __init__(
        self, blocks: Blocks, d_sae: PositiveInt, coefficient: NonNegativeFloat, **common: Unpack[Common]
    ) -> None:
        super().__init__(blocks, d_sae, **common)
        self.coefficient = coefficient
        self.r_mag = torch.nn.Parameter(torch.zeros(self.shard.num_latents))
        self.b_mag = torch.nn.Parameter(torch.zeros(self.shard.num_latents))

    def respond(self, pre: Tensor, at: Callable[[Tensor], Tensor], inner: Tensor | None, now: Moment) -> Response:
        gate = pre.relu()
        codes = (pre > 0) * self._magnitude(pre, at)
        penalty = (gate * at(self.decoder_norms())).sum()
        return Response(codes, penalty, (Extra("gate_recon", gate, 1.0, frozen=True),))

    def activate(self, pre_BF: Tensor) -> Tensor:
        return (pre_BF > 0) * self._magnitude(pre_BF, lambda values_F: values_F)

    def inference_tensors(self) -> dict[str, Tensor]:
        return {**super().inference_tensors(), "r_mag": self.r_mag.detach(), "b_mag": self.b_mag.detach()}

    def _magnitude(self, pre: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        # the gate's bias taken off again leaves the product that both share
        return (at(self.r_mag.exp()) * (pre - at(self.b_enc)) + at(self.b_mag)).relu()
