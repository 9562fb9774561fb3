"""BatchTopK (Bussmann et al. 2024) against the published formulas, written densely."""

from __future__ import annotations

import pytest
import torch
from shapes import assert_same, assert_trains_by, make, moment, mse, pre_of, rows

from sparsepilot.autoencoders.batchtopk import BatchTopK

pytestmark = pytest.mark.usefixtures("both_paths")


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
