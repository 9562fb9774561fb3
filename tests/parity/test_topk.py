"""TopK, Multi-TopK and k-annealing (Gao et al. 2024) against the published formulas, written densely."""

from __future__ import annotations

import pytest
import torch
from shapes import TOTAL, assert_same, assert_trains_by, make, moment, mse, pre_of, rows, top_codes

pytestmark = pytest.mark.usefixtures("both_paths")


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
