"""Metrics against plain restatements, and merged over ranks as over batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from sparsepilot.metrics import recovery
from sparsepilot.metrics.dead import DeadLatents
from sparsepilot.metrics.firing import LOG10_EDGES, FiringDensity
from sparsepilot.metrics.fvu import FVU
from sparsepilot.metrics.l0 import L0
from sparsepilot.metrics.mse import MSE

B, D, F = 600, 8, 40


def data() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x_BD = torch.randn(B, D) + 5.0
    codes_BF = torch.relu(torch.randn(B, F) - 1.0)
    return x_BD, x_BD + 0.5 * torch.randn(B, D), codes_BF


def errors(metric: Metric, rows: slice) -> None:
    x_BD, x_hat_BD, _ = data()
    metric.update(x_BD[rows], x_hat_BD[rows])


def firings(metric: Metric, rows: slice) -> None:
    codes_BF = data()[2][rows]
    metric.update((codes_BF > 0).sum(0), len(codes_BF))


def cases() -> list[Any]:
    x_BD, x_hat_BD, codes_BF = data()
    mean_D = x_BD.mean(0)
    fvu = ((x_BD - x_hat_BD) ** 2).sum() / ((x_BD - mean_D) ** 2).sum()
    return [
        pytest.param(lambda: FVU(mean_D), errors, fvu, id="fvu"),
        pytest.param(MSE, errors, ((x_BD - x_hat_BD) ** 2).mean(), id="mse"),
        pytest.param(L0, firings, (codes_BF != 0).sum(1).float().mean(), id="l0"),
        pytest.param(lambda: FiringDensity(F), firings, (codes_BF > 0).float().mean(0), id="firing"),
    ]


@pytest.mark.parametrize(("make", "update", "truth"), cases())
def test_batches_and_ranks_merge_to_the_plain_formula(
    make: Callable[[], Metric], update: Callable[[Metric, slice], None], truth: Tensor
) -> None:
    ranks = [make(), make()]
    for rank, metric in enumerate(ranks):
        for start, stop in ((0, 1), (1, 130), (130, 300)):
            update(metric, slice(300 * rank + start, 300 * rank + stop))
    merged = make()
    for name in merged._defaults:
        merged_state = torch.stack([getattr(metric, name) for metric in ranks]).sum(0)
        assert merged._reductions[name] is not None
        setattr(merged, name, merged_state)
    merged._update_count = 1
    torch.testing.assert_close(merged.compute(), truth.double(), rtol=1e-6, atol=0)


def test_fvu_about_zero_would_look_better() -> None:
    """Field notes: a tool that took zero for the mean reported 0.98 explained where the truth was 0.78."""
    x_BD, x_hat_BD, _ = data()
    metric = FVU(x_BD.mean(0))
    metric.update(x_BD, x_hat_BD)
    about_zero = float(((x_BD - x_hat_BD) ** 2).sum() / (x_BD**2).sum())
    assert float(metric.compute()) > 10 * about_zero


def test_dead_latents_count_in_samples_beyond_what_fp32_holds() -> None:
    metric = DeadLatents(d_sae=3, window_samples=100)
    clock = 2**24 + 1  # fp32 would round it to 2^24
    metric.update(torch.tensor([1, 1, 3]), samples=clock)
    assert metric.last_fired_F.tolist() == [clock, clock, clock]
    metric.update(torch.tensor([0, 2, 0]), samples=clock + 100)
    assert int(metric.compute()) == 0  # silent for as long as the window, not longer
    metric.update(torch.tensor([0, 2, 0]), samples=clock + 101)
    assert metric.dead_mask().tolist() == [True, False, True]
    metric.update(torch.tensor([1, 1, 0]), samples=clock + 101)
    assert int(metric.compute()) == 1
    assert metric.silent_mask(clock).tolist() == [False, False, True]
    state = metric.state_dict()
    fresh = DeadLatents(d_sae=3, window_samples=100)
    fresh.load_state_dict(state)
    assert fresh.last_fired_F.tolist() == metric.last_fired_F.tolist()
    assert int(fresh.samples) == clock + 101


def test_firing_histogram_counts_every_latent_that_fired() -> None:
    metric = FiringDensity(d_sae=4)
    metric.update(torch.tensor([1000, 10, 1, 0]), num_rows=1000)
    counts = metric.histogram()
    assert sum(counts) == 3
    assert [LOG10_EDGES[i] for i, count in enumerate(counts) if count] == [-3.0, -2.0, -0.25]


def test_recovery_in_blocks_of_latents_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_TD, decoder_FD = torch.randn(7, 16), torch.randn(40, 16)
    unit_TD, unit_FD = (matrix / matrix.norm(dim=1, keepdim=True) for matrix in (planted_TD, decoder_FD))
    monkeypatch.setattr(recovery, "BLOCK_COSINES", 7 * 3 + 1)  # three latents at once, the last one alone
    metric = recovery.DictionaryRecovery(planted_TD)
    metric.update(decoder_FD)
    torch.testing.assert_close(metric.compute(), (unit_TD @ unit_FD.T).amax(dim=1).mean())
