"""Matryoshka (Bussmann et al. 2025) against the published formula, written densely."""

from __future__ import annotations

import pytest
from shapes import BATCH, F, assert_trains_by, make, moment, mse, pre_of, rows
from torch import Tensor

from sparsepilot.autoencoders.prefixes import FixedPrefixes, RandomPrefixes

pytestmark = pytest.mark.usefixtures("both_paths")


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
