"""JumpReLU autoencoder (Rajamanoharan et al. 2024, arXiv 2407.14435), in two published recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from sparsepilot.autoencoders.base import Common
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.penalised import Penalised
from sparsepilot.autoencoders.step import Knob, Moment, Response
from sparsepilot.autoencoders.weights import weights_and_biases
from sparsepilot.errors import ConfigError
from sparsepilot.ops.jump import jump, step
from sparsepilot.parallel.shards import own, sum_over_parts

SLEW_NATS_PER_THRESHOLD_LR = 2.6
"""ln L0 that is lost per unit by which all log thresholds rise, at its fastest: measured (docs/log.md, 2026-11-22)."""


class JumpReLU(Penalised):
    """f(x) = pre * H(pre - theta),  pre = W_enc (x - b_in) + b_enc,  theta = exp(log_threshold) > 0

    loss = ||y - y_hat||^2 + coefficient * sum_i penalty_i

        step  H(pre_i - theta_i), i.e. the L0, with a narrow kernel: gradients reach thresholds only
              (Rajamanoharan et al. 2024; Adam betas (0, 0.999) for the thresholds, the paper's for all parameters:
              optimizer.betas=[0,0.999])
              With `target_l0` the penalty is (L0 / target_l0 - 1)^2 of the batch instead, in the form of its first two
              terms around the L0 of the step before: a ratio of batch means, and yet the same on one rank and on many
        tanh  tanh(steepness * f_i ||W_dec[i]||) with a wide kernel whose gradient also reaches pre-activations
              (Conerly et al., Transformer Circuits, January 2025)

    H's derivative is a rectangle of width `bandwidth` and height 1 / bandwidth around theta, on pre-activations, both
    sides of the threshold. Thresholds are fp32 and have an optimizer group of their own.

    Args:
        coefficient: of the penalty; the knob.
        recipe: which penalty and kernel.
        threshold: theta at the start; None: 0.001 sqrt(d_in) for step (0.001 where E||x||^2 = 1), 0.1 for tanh.
        bandwidth: None: 0.001 sqrt(d_in) for step, 2.0 for tanh.
        threshold_lr_scale: learning rate of the thresholds' logarithm over that of the rest.
        steepness: of tanh.
        target_l0: set point of the quadratic penalty; None: the penalty is the L0 itself, for a controller to hold.

    Raises:
        ConfigError: `target_l0` with recipe tanh, whose penalty is no L0.
    """

    architecture = "jumprelu"
    latent_buffers = ("last_log_threshold",)
    per_latent = (*Penalised.per_latent, "log_threshold", "last_log_threshold")
    last_log_threshold: Tensor
    """[F] before the last optimizer step"""
    coherence: Tensor
    last_l0: Tensor
    """scalar, with `target_l0` only: L0 of the step before; below 0 before the first"""

    def __init__(
        self,
        blocks: Blocks,
        d_sae: PositiveInt,
        coefficient: NonNegativeFloat,
        recipe: Literal["step", "tanh"] = "step",
        threshold: PositiveFloat | None = None,
        bandwidth: PositiveFloat | None = None,
        threshold_lr_scale: PositiveFloat = 10.0,
        steepness: PositiveFloat = 4.0,
        target_l0: PositiveFloat | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(blocks, d_sae, **common)
        self.coefficient = coefficient
        self.target_l0 = target_l0
        self.recipe = recipe
        self.unit_decoder = self.integrates = recipe == "step"
        narrow = 1e-3 * blocks.encoder_width**0.5
        self.bandwidth = bandwidth or (narrow if recipe == "step" else 2.0)
        self.threshold_lr_scale = threshold_lr_scale
        if recipe == "step":  # thresholds alone press on L0, by one learning rate of theirs in a step
            self.slew_nats_per_lr = SLEW_NATS_PER_THRESHOLD_LR * threshold_lr_scale
        self.steepness = steepness
        start = threshold or (narrow if recipe == "step" else 0.1)
        self.log_threshold = torch.nn.Parameter(torch.full((self.shard.num_latents,), start).log())
        self.register_buffer("last_log_threshold", self.log_threshold.detach().clone())
        self.register_buffer("coherence", torch.zeros(()))
        if target_l0 is not None:
            if recipe != "step":
                raise ConfigError(f"model.target_l0 = {target_l0:g}: the penalty of recipe={recipe} is no L0; use step")
            self.register_buffer("last_l0", torch.tensor(-1.0))

    @property
    def knob(self) -> Knob:
        if self.target_l0 is None:
            return super().knob
        return super().knob._replace(
            steered_by=f"model.target_l0 = {self.target_l0:g}: the loss holds that L0 by itself"
        )

    def pressed(self, sparsity: Tensor) -> Tensor:
        if self.target_l0 is None:
            return sparsity
        last_l0 = torch.where(self.last_l0 < 0, self.target_l0, self.last_l0)  # no pressure in the first step
        excess = last_l0 / self.target_l0 - 1
        return excess.square() + 2 * excess / self.target_l0 * (sparsity - last_l0)

    def thresholds(self) -> Tensor:
        return self.log_threshold.exp()

    def close_step(self, terms: dict[str, Tensor], now: Moment) -> None:
        moved_F = own(self.log_threshold) - own(self.last_log_threshold)
        # Adam moves every threshold by about its learning rate: when the penalty rules, all of them the same way
        sums = sum_over_parts(torch.stack([moved_F.sum(), moved_F.abs().sum()]), self.log_threshold)
        one_way, both_ways = self.shard.sum_(sums)
        self.coherence.copy_(one_way / both_ways.clamp_min(1e-30))
        if self.target_l0 is not None:
            self.last_l0.copy_(terms["sparsity"])
        self.forget_motion()

    @torch.no_grad()
    def forget_motion(self) -> None:
        own(self.last_log_threshold).copy_(own(self.log_threshold))

    def threshold_coherence(self) -> Tensor:
        return self.coherence

    @torch.no_grad()
    def shift_thresholds_(self, by: float) -> None:
        log_threshold_F = own(self.log_threshold)
        log_threshold_F.copy_((log_threshold_F.exp() + by).clamp_min(1e-6).log())
        self.forget_motion()

    def bounds(self, now: Moment) -> Tensor:
        """The lower edge of the kernel; the threshold itself where no gradient is wanted."""
        thresholds_F = self.thresholds()
        return thresholds_F if now.inference else thresholds_F - self.bandwidth / 2

    def respond(self, pre: Tensor, at: Callable[[Tensor], Tensor], inner: Tensor | None, now: Moment) -> Response:
        thresholds = at(self.thresholds())
        codes = jump(pre, thresholds, self.bandwidth, to_pre=self.recipe == "tanh")
        if self.recipe == "step":
            return Response(codes, step(pre, thresholds, self.bandwidth).sum())
        return Response(codes, torch.tanh(self.steepness * codes * at(self.decoder_norms())).sum())

    def activate(self, pre_BF: Tensor) -> Tensor:
        return pre_BF * (pre_BF > self.thresholds())

    def parameter_groups(self) -> list[dict[str, Any]]:
        rest = [p for p in self.parameters() if p is not self.log_threshold]
        betas = {"betas": (0.0, 0.999)} if self.recipe == "step" else {}
        return [
            *weights_and_biases(rest),
            {"params": [self.log_threshold], "lr_scale": self.threshold_lr_scale, "weight_decay": 0.0, **betas},
        ]

    @torch.no_grad()
    def adopt(self, tensors: dict[str, Tensor]) -> None:
        super().adopt(tensors)
        if "threshold" in tensors:
            self.log_threshold.copy_(self.shard.own(tensors["threshold"]).clamp_min(1e-6).log())
            self.forget_motion()

    def inference_tensors(self) -> dict[str, Tensor]:
        return {**super().inference_tensors(), "threshold": self.thresholds().detach()}
