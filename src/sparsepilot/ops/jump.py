"""The jump of JumpReLU with straight-through gradients, as published: a rectangle around the threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_pre = bandwidth, to_pre
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        inside = threshold / ctx.bandwidth * ((pre - threshold).abs() < ctx.bandwidth / 2)
        to_pre = (pre > threshold) + inside if ctx.to_pre else pre > threshold
        return grads[0] * to_pre, _like(-grads[0] * inside, threshold), None, None


def jump(pre: Tensor, threshold: Tensor, bandwidth: float, to_pre: bool) -> Tensor:
    """pre * H(pre - threshold). Backward, with K = 1 where |pre - threshold| < bandwidth / 2, else 0:

        d / d threshold = -threshold / bandwidth * K
        d / d pre       = H(pre - threshold), plus threshold / bandwidth * K where `to_pre`

    (Rajamanoharan et al. 2024, arXiv 2407.14435, equation 11. Conerly et al., January 2025, want the gradient of the
    tanh penalty to reach all parameters; that the rectangle lets it through to the pre-activations, too, is a reading
    of ours, and common code does without: the two gradients differ by theta / bandwidth near the threshold.) K is taken
    on pre-activations: on the values after the jump, everything just below the threshold would be lost.
    """
    out: Tensor = _Jump.apply(pre, threshold, bandwidth, to_pre)  # type: ignore[no-untyped-call]
    return out


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        inside = ((pre - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return None, _like(-grads[0] * inside, threshold), None


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """H(pre - threshold), 1 or 0. Backward: d / d threshold = -K / bandwidth (equation 12); none to pre."""
    out: Tensor = _Step.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return out


def _like(grad: Tensor, threshold: Tensor) -> Tensor:
    """The gradient summed over the rows that one threshold was broadcast to."""
    return grad if grad.shape == threshold.shape else grad.sum_to_size(threshold.shape)
