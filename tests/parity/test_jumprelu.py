"""JumpReLU's two recipes, its quadratic penalty and the pre-activation loss against the published formulas, written
densely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import BLOCKS, assert_same, assert_trains_by, dead_ids, make, moment, mse, norms_of, pre_of, rows
from torch import Tensor

from sparsepilot.autoencoders.jumprelu import JumpReLU
from sparsepilot.autoencoders.revival import PreActivation
from sparsepilot.errors import ConfigError

pytestmark = pytest.mark.usefixtures("both_paths")


class _Heaviside(torch.autograd.Function):
    """H(pre - theta) with the rectangle kernel for theta and, in the recipe of January 2025, for pre."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float, to_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.settings = width, to_pre
        return (pre > theta).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, theta = ctx.saved_tensors
        width, to_pre = ctx.settings
        kernel = (((pre - theta) / width).abs() < 0.5).float() / width
        return grads[0] * kernel if to_pre else None, -(grads[0] * kernel).sum(0), None, None


def jump_of(pre: Tensor, theta: Tensor, width: float, to_pre: bool) -> Tensor:
    """pre * H(pre - theta), where the kernel stands for pre = theta: theta in place of pre in H's derivative."""
    H = _Heaviside.apply(pre, theta, width, to_pre)
    at_theta = theta.detach() * (H - H.detach())  # 0, with the derivative of theta * H
    return pre * H.detach() + at_theta


def test_jumprelu_with_the_step_penalty() -> None:
    """Rajamanoharan et al. 2024, equations 9 to 12: lambda ||f||_0; both kernels reach the thresholds only."""
    model = make("jumprelu-step", "autoencoder")
    assert isinstance(model, JumpReLU)
    x_BD, y_BD = rows(model)
    pre_BF, theta_F = pre_of(model, x_BD), model.log_threshold.exp()
    codes_BF = jump_of(pre_BF, theta_F, 0.2, to_pre=False)
    sparsity = _Heaviside.apply(pre_BF, theta_F, 0.2, False).sum(1).mean()
    loss = mse(y_BD, codes_BF @ model.W_dec + model.b_dec) + 0.3 * sparsity
    step = model(x_BD, y_BD, moment(model))
    assert_trains_by(model, step.loss, loss)
    assert_same(step.terms["sparsity"], (codes_BF > 0).sum(1).float().mean(), "the L0")


def test_jumprelu_with_a_target_in_the_loss() -> None:
    """Rajamanoharan et al. 2024, appendix: lambda (L0 / L0* - 1)^2, here to first order around the step before."""
    for target in (2.0, 5.0):
        model = make("jumprelu-target", "autoencoder", target=target)
        assert isinstance(model, JumpReLU)
        x_BD, y_BD = rows(model)

        def plain(model: JumpReLU = model, x_BD: Tensor = x_BD, y_BD: Tensor = y_BD) -> tuple[Tensor, Tensor]:
            pre_BF, theta_F = pre_of(model, x_BD), model.log_threshold.exp()
            recon = mse(y_BD, jump_of(pre_BF, theta_F, 0.2, to_pre=False) @ model.W_dec + model.b_dec)
            return recon, _Heaviside.apply(pre_BF, theta_F, 0.2, False).sum(1).mean()

        now = moment(model, strength=7.0)
        first = model(x_BD, y_BD, now)
        assert_trains_by(model, first.loss, plain()[0])  # nothing is known yet: no pressure
        model.close_step(first.terms, now)  # the same rows again: the expansion is around their own L0
        recon, l0 = plain()
        assert_trains_by(model, model(x_BD, y_BD, now).loss, recon + 7.0 * (l0 / target - 1) ** 2)
        with torch.no_grad():
            model.log_threshold.add_(0.01)  # the L0 has moved: as far from the formula as the next term is large
        after = model(x_BD, y_BD, now)
        excess = (float(after.terms["sparsity"]) - float(l0.detach())) / target
        exact = 7.0 * (float(after.terms["sparsity"]) / target - 1) ** 2
        assert excess < 0
        assert float(after.loss.detach() - after.terms["recon"]) == pytest.approx(exact - 7.0 * excess**2, abs=1e-4)


def test_a_target_in_the_loss_is_of_the_step_recipe() -> None:
    with pytest.raises(ConfigError, match="model.target_l0 = 8: the penalty of recipe=tanh is no L0; use step"):
        JumpReLU(BLOCKS["autoencoder"], 96, 1.0, recipe="tanh", target_l0=8.0)


def test_jumprelu_with_the_tanh_penalty_and_the_pre_activation_loss() -> None:
    """Conerly et al., January 2025: lambda sum tanh(4 f ||W_dec||), a kernel that reaches the pre-activations, too, and
    c sum over dead latents of ReLU(theta - pre) ||W_dec||."""
    model = make("jumprelu-tanh", "autoencoder", revival=PreActivation(0.02))
    assert isinstance(model, JumpReLU)
    x_BD, y_BD = rows(model)
    dead = dead_ids(9)
    pre_BF, theta_F, norms_F = pre_of(model, x_BD), model.log_threshold.exp(), norms_of(model)
    codes_BF = jump_of(pre_BF, theta_F, 0.6, to_pre=True)
    loss = mse(y_BD, codes_BF @ model.W_dec + model.b_dec)
    loss = loss + 0.3 * torch.tanh(4 * codes_BF * norms_F).sum(1).mean()
    lift = ((theta_F - pre_BF).relu() * norms_F)[:, dead].sum(1).mean()
    step = model(x_BD, y_BD, moment(model, dead))
    assert_trains_by(model, step.loss, loss + 0.02 * lift)
    assert_same(step.terms["pre_activation"], lift.detach(), "pre_activation")


def test_the_recipes_of_jumprelu_start_as_published() -> None:
    """Theta 0.1 and bandwidth 2.0 where E||x||^2 is the width; 0.001 each where it is 1. Betas (0, 0.999) for step."""
    step, tanh = make("jumprelu-step", "autoencoder"), make("jumprelu-tanh", "autoencoder")
    narrow = JumpReLU(step.blocks, 8, 1.0)
    assert narrow.bandwidth == pytest.approx(0.001 * 12**0.5)
    assert narrow.thresholds().tolist() == pytest.approx([0.001 * 12**0.5] * 8)
    wide = JumpReLU(step.blocks, 8, 1.0, recipe="tanh")
    assert wide.bandwidth == 2.0
    assert wide.thresholds().tolist() == pytest.approx([0.1] * 8)
    for model, betas in ((step, (0.0, 0.999)), (tanh, None)):
        groups = model.parameter_groups()
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        (own,) = [group for group in groups if any(p is model.log_threshold for p in group["params"])]
        assert own.get("betas") == betas
