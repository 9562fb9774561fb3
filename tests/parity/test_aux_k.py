"""AuxK (Gao et al. 2024, appendix A.2) against the published formula, written densely."""

from __future__ import annotations

import pytest
import torch
from shapes import assert_same, assert_trains_by, dead_ids, make, moment, mse, pre_of, rows, top_codes
from torch import Tensor

from sparsepilot import losses
from sparsepilot.autoencoders.revival import AuxK

pytestmark = pytest.mark.usefixtures("both_paths")


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
    for residual in (0.0, 1e-13):
        value = losses.aux_k(torch.tensor(3.0, requires_grad=True), torch.tensor(residual), floor=1e-12)
        assert float(value.detach()) == 0.0
    assert float(losses.aux_k(torch.tensor(3.0), torch.tensor(2.0), floor=1e-12)) == 1.5
