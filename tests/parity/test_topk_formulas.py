"""TopK, AuxK, Multi-TopK, k-annealing, BatchTopK and Matryoshka against the published formulas, written densely."""

from __future__ import annotations

import pytest
import shapes
import torch
from shapes import BATCH, TOTAL, F, assert_same, assert_trains_by, dead_ids, make, moment, mse, pre_of, rows
from torch import Tensor

from sparsepilot.autoencoders.batchtopk import BatchTopK
from sparsepilot.autoencoders.prefixes import FixedPrefixes, RandomPrefixes
from sparsepilot.autoencoders.revival import AuxK


@pytest.fixture(autouse=True, params=[1.0, 0.0], ids=["sparse", "dense"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "DENSE_ABOVE", request.param)


def top_codes(pre_BF: Tensor, k: int) -> Tensor:
    """TopK(ReLU(pre))"""
    kth = pre_BF.detach().topk(k).values[:, -1:]
    return pre_BF.relu() * (pre_BF >= kth)


def top_values(pre_BF: Tensor, k: int) -> Tensor:
    """TopK(pre), of either sign: AuxK's"""
    kth = pre_BF.detach().topk(k).values[:, -1:]
    return pre_BF * (pre_BF >= kth)


@pytest.mark.parametrize("num_dead", [0, 2, 60])
@pytest.mark.parametrize("blocks", ["autoencoder", "transcoder-skip"])
def test_topk_with_aux_k(blocks: str, num_dead: int) -> None:
    """Gao et al. 2024, section 2.3 and appendix A.2."""
    model = make("topk", blocks, revival=AuxK(aux_k=4))
    x_BD, y_BD = rows(model)
    step = model(x_BD, y_BD, moment(model, dead_ids(num_dead), mean_sq_residual=torch.tensor(3.0)))

    pre_BF = pre_of(model, x_BD)
    y_hat_BD = top_codes(pre_BF, 4) @ model.W_dec + model.b_dec
    if model.W_skip is not None:
        y_hat_BD = y_hat_BD + (x_BD - model.b_in) @ model.W_skip.T
    loss = mse(y_BD, y_hat_BD)
    if num_dead:
        dead = dead_ids(num_dead)
        e_BD = (y_BD - y_hat_BD).detach()
        e_hat_BD = top_values(pre_BF[:, dead], min(4, num_dead)) @ model.W_dec[dead]  # without b_dec: mistake 5
        loss = loss + 1 / 32 * 7.0 * mse(e_BD, e_hat_BD) / 3.0  # in units of the variance 7; normalised by ||e||^2 = 3
    assert_trains_by(model, step.loss, loss)
    assert step.terms.keys() == {"recon", "aux_k"} if num_dead else {"recon"}


def test_aux_k_takes_half_the_width_by_default() -> None:
    model = make("topk", "autoencoder", revival=AuxK(coefficient=1.0))  # width 12
    x_BD, y_BD = rows(model)
    dead = dead_ids(50)
    step = model(x_BD, y_BD, moment(model, dead))
    e_BD = y_BD - step.y_hat_BD
    e_hat_BD = top_values(pre_of(model, x_BD)[:, dead], 6) @ model.W_dec[dead]
    assert_same(step.terms["aux_k"], (mse(e_BD, e_hat_BD) / 3.0).detach(), "aux_k")


def test_multi_topk() -> None:
    """Gao et al. 2024, section 5.4: L(k) + L(4k) / 8."""
    model = make("topk-multi", "autoencoder")
    x_BD, y_BD = rows(model)
    step = model(x_BD, y_BD, moment(model))
    pre_BF = pre_of(model, x_BD)
    both = [mse(y_BD, top_codes(pre_BF, k) @ model.W_dec + model.b_dec) for k in (4, 16)]
    assert_trains_by(model, step.loss, both[0] + both[1] / 8)
    assert_same(step.terms["multi_topk"], both[1].detach(), "multi_topk")
    assert int(step.firings_F.sum()) <= 4 * len(x_BD)  # the L0 is that of k latents


def test_k_annealing() -> None:
    """k falls linearly from anneal_k_from = 24 to 4 over half of the budget; at inference it is 4 at once."""
    model = make("topk-annealed", "autoencoder")
    x_BD, y_BD = rows(model)
    with torch.no_grad():
        for samples, k in [(0, 24), (TOTAL // 4, 14), (TOTAL // 2, 4), (TOTAL, 4)]:
            step = model(x_BD, y_BD, moment(model, samples=samples))
            assert_same(step.y_hat_BD, top_codes(pre_of(model, x_BD), k) @ model.W_dec + model.b_dec, f"k = {k}")
        step = model.evaluate(x_BD, y_BD, 4)
        assert_same(step.y_hat_BD, top_codes(pre_of(model, x_BD), 4) @ model.W_dec + model.b_dec, "inference")


def test_batchtopk_and_its_threshold() -> None:
    """Bussmann et al. 2024: the n k largest of the batch; at inference above E[the smallest let through]."""
    model = make("batchtopk", "autoencoder")
    assert isinstance(model, BatchTopK)
    x_BD, y_BD = rows(model)
    now = moment(model)
    smallest = []
    for scale in (1.0, 1.5, 0.7):
        step = model(scale * x_BD, scale * y_BD, now)
        pre_BF = pre_of(model, scale * x_BD)
        theta = pre_BF.detach().flatten().topk(round(4.5 * len(x_BD))).values[-1]
        codes_BF = pre_BF * (pre_BF >= theta)
        assert_trains_by(model, step.loss, mse(scale * y_BD, codes_BF @ model.W_dec + model.b_dec))
        assert float(step.terms["threshold"]) == pytest.approx(float(theta), rel=1e-6)
        smallest.append(float(theta))
        model.close_step(step.terms, now)
    average = smallest[0]
    for value in smallest[1:]:
        average = 0.95 * average + 0.05 * value
    assert float(model.threshold) == pytest.approx(average, rel=1e-6)
    with torch.no_grad():
        pre_BF = pre_of(model, x_BD)
        codes_BF = pre_BF * (pre_BF > model.threshold)
        assert_same(model.evaluate(x_BD, y_BD, 4.5).y_hat_BD, codes_BF @ model.W_dec + model.b_dec, "inference")
        assert_same(model.encode(x_BD), codes_BF, "codes")


@pytest.mark.parametrize("random", [False, True])
def test_matryoshka(random: bool) -> None:
    """Bussmann et al. 2025: the sum over nested prefixes m of ||y - y_hat_{first m latents}||^2, selection on all."""
    prefixes = RandomPrefixes(4) if random else FixedPrefixes([0.1, 0.25])
    model = make("batchtopk", "autoencoder", prefixes=prefixes)
    x_BD, y_BD = rows(model)
    seen = []
    for samples in (BATCH, 2 * BATCH):
        step = model(x_BD, y_BD, moment(model, samples=samples, seed=5))
        ends = prefixes.ends(F, 5, samples)
        assert ends[-1] == F
        assert sorted(set(ends)) == ends
        seen.append(ends)
        pre_BF = pre_of(model, x_BD)
        theta = pre_BF.detach().flatten().topk(round(4.5 * len(x_BD))).values[-1]
        codes_BF = pre_BF * (pre_BF >= theta)
        loss = sum(mse(y_BD, codes_BF[:, :m] @ model.W_dec[:m] + model.b_dec) for m in ends)
        assert isinstance(loss, Tensor)
        assert_trains_by(model, step.loss, loss)
    assert (seen[0] == seen[1]) == (not random)
    assert random or seen[0] == [10, 24, F]


def test_aux_k_reaches_latents_whose_pre_activations_are_all_negative() -> None:
    model = make("topk", "autoencoder", revival=AuxK(aux_k=4))
    dead = dead_ids(3)
    with torch.no_grad():
        model.b_enc[dead] = -50.0
    step = model(*rows(model), moment(model, dead))
    (gradient,) = torch.autograd.grad(step.loss, model.b_enc)
    assert bool((gradient[dead] < 0).all())  # a step of descent lifts them


def test_aux_k_of_a_perfect_reconstruction_is_nothing() -> None:
    """0 / 0 in the published form; a residual that is rounding noise must not become the whole loss."""
    from sparsepilot import losses

    for residual in (0.0, 1e-13):
        value = losses.aux_k(torch.tensor(3.0, requires_grad=True), torch.tensor(residual), floor=1e-12)
        assert float(value.detach()) == 0.0
    assert float(losses.aux_k(torch.tensor(3.0), torch.tensor(2.0), floor=1e-12)) == 1.5
