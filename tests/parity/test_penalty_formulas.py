"""ReLU and its penalties, p-annealing, JumpReLU's two recipes, Gated and the pre-activation loss against the published
formulas, written densely."""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
from shapes import BATCH, TOTAL, assert_same, assert_trains_by, dead_ids, make, moment, mse, pre_of, rows
from torch import Tensor

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.gated import Gated
from sparsepilot.autoencoders.jumprelu import JumpReLU
from sparsepilot.autoencoders.relu import ReLU
from sparsepilot.autoencoders.revival import PreActivation


@pytest.fixture(autouse=True, params=[1.0, 0.0], ids=["sparse", "dense"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "DENSE_ABOVE", request.param)


def norms_of(model: Autoencoder) -> Tensor:
    """||W_dec[i]||; of a crosscoder the sum over its sites (Lindsey et al. 2024)."""
    return sum(part.norm(dim=1) for part in model.W_dec.split(model.blocks.write_widths, dim=1))  # type: ignore[return-value]


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


PENALTIES = {
    "l1": lambda u: u,
    "tanh": lambda u: torch.tanh(4 * u),
    "log": lambda u: torch.log(1 + 4 * u),
}


@pytest.mark.parametrize("blocks", ["autoencoder", "crosscoder"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_relu(penalty: str, blocks: str) -> None:
    """||y - y_hat||^2 + coefficient sum penalty(f ||W_dec||); decoder rows of any norm."""
    model = make(f"relu-{penalty}", blocks)
    x_BD, y_BD = rows(model)
    codes_BF = pre_of(model, x_BD).relu()
    sparsity = PENALTIES[penalty](codes_BF * norms_of(model)).sum(1).mean()
    loss = mse(y_BD, codes_BF @ model.W_dec + model.b_dec) + 0.3 * sparsity
    step = model(x_BD, y_BD, moment(model))
    assert_trains_by(model, step.loss, loss)
    assert_same(step.terms["sparsity"], sparsity.detach(), "sparsity")
    assert_same(step.firings_F, (codes_BF > 0).sum(0), "firings")


def test_p_annealing_keeps_the_size_of_the_penalty() -> None:
    """Karvonen et al. 2024: sum u^p; where p steps down, the coefficient times S_before / S_after of the last batch."""
    # the derivative of u^p grows without bound towards u = 0: the same product in the same order on both sides
    model = make("relu-p", "autoencoder", half_product=False)
    assert isinstance(model, ReLU)
    x_BD, y_BD = rows(model)
    scale, changes = 1.0, 0
    for samples in range(BATCH, TOTAL + 1, BATCH):
        p = [1 - 0.8 * step / 15 for step in range(16)][int(15 * samples / TOTAL + 1e-9)]
        p_next = [1 - 0.8 * step / 15 for step in range(16)][min(15, int(15 * (samples + BATCH) / TOTAL + 1e-9))]
        u_BF = pre_of(model, x_BD).relu() * norms_of(model)
        powers = {q: torch.where(u_BF > 0, u_BF, 1).pow(q).mul(u_BF > 0).sum(1).mean() for q in (p, p_next)}
        now = moment(model, samples=samples)
        step = model(x_BD, y_BD, now)
        if samples % (9 * BATCH) == 0:
            loss = mse(y_BD, pre_of(model, x_BD).relu() @ model.W_dec + model.b_dec) + 0.3 * scale * powers[p]
            assert_trains_by(model, step.loss, loss)
        assert_same(step.terms["sparsity"], scale * powers[p].detach(), "sparsity")
        model.close_step(step.terms, now)
        if p_next != p:
            scale *= float((powers[p] / powers[p_next]).detach())
            changes += 1
            after = model(x_BD, y_BD, moment(model, samples=samples + BATCH))  # the same rows: the same size
            assert float(after.terms["sparsity"]) == pytest.approx(float(step.terms["sparsity"]), rel=1e-5)
    assert changes == 15
    assert float(model.penalty_scale) == pytest.approx(scale, rel=1e-4)


def test_p_annealing_survives_a_batch_in_which_nothing_fires() -> None:
    model = make("relu-p", "autoencoder")
    x_BD, y_BD = rows(model)
    with torch.no_grad():
        bias_F = model.b_enc.clone()
        model.b_enc.fill_(-1e3)
    now = moment(model, samples=TOTAL // 15 // BATCH * BATCH)
    model.close_step(model(x_BD, y_BD, now).terms, now)
    with torch.no_grad():
        model.b_enc.copy_(bias_F)
    assert float(model(x_BD, y_BD, moment(model, samples=now.samples + BATCH)).terms["sparsity"]) > 0


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


def test_gated() -> None:
    """Rajamanoharan et al. 2024 (Gated), equations 3 to 8: L1 on ReLU(gate), an auxiliary reconstruction from it with
    a frozen decoder."""
    model = make("gated", "autoencoder")
    assert isinstance(model, Gated)
    x_BD, y_BD = rows(model)
    product_BF = (x_BD - model.b_dec) @ model.W_enc.T
    gate_BF = product_BF + model.b_enc
    codes_BF = (gate_BF > 0) * (model.r_mag.exp() * product_BF + model.b_mag).relu()
    frozen_BD = gate_BF.relu() @ model.W_dec.detach() + model.b_dec.detach()
    loss = mse(y_BD, codes_BF @ model.W_dec + model.b_dec) + 0.3 * gate_BF.relu().sum(1).mean() + mse(y_BD, frozen_BD)
    step = model(x_BD, y_BD, moment(model))
    assert_trains_by(model, step.loss, loss)
    assert_same(step.firings_F, (codes_BF > 0).sum(0), "firings")
