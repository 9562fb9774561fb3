"""Descent by the sign of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class SignDescent(Optimizer):
    """Signum (Bernstein et al. 2018, arXiv 1802.04434): every entry moves by the learning rate, up or down.

        m <- momentum m + (1 - momentum) g
        w <- (1 - lr weight_decay) w - lr sign(m)          sign(0) = 0

    Without momentum m is g, nothing is stored, and a latent that got no gradient stands still. With momentum such a
    latent walks on at full speed, however small m has become, until it fires again or m underflows.

    Args:
        params: parameters or groups; options of other optimizers in a group (`betas`) are ignored.
        lr: how far each entry moves in a step.
        momentum: 0 is plain sign descent.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: PositiveFloat = 1e-3,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:  # foreach takes no empty list
                continue
            directions: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]  # None was left out above
            if group["momentum"]:
                averages = [self._average(p) for p in params]
                torch._foreach_lerp_(averages, directions, 1 - group["momentum"])
                directions = averages
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, torch._foreach_sign(directions), alpha=-group["lr"])
        return loss

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]  # type: ignore[no-any-return]
