"""Gated (Rajamanoharan et al. 2024) against the published formulas, written densely."""

from __future__ import annotations

import pytest
from shapes import assert_same, assert_trains_by, make, moment, mse, rows

from sparsepilot.autoencoders.gated import Gated

pytestmark = pytest.mark.usefixtures("both_paths")


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
