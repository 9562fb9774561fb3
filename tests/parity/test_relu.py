"""ReLU, its penalties and p-annealing against the published formulas, written densely."""

from __future__ import annotations

import pytest
import torch
from shapes import BATCH, TOTAL, assert_same, assert_trains_by, make, moment, mse, norms_of, pre_of, rows

from sparsepilot.autoencoders.relu import ReLU

pytestmark = pytest.mark.usefixtures("both_paths")


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
