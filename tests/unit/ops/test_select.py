"""Which latents are active, tile by tile, against plain torch on the whole product; and the same in half precision."""

from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepilot.ops import product as product_module
from sparsepilot.ops.product import EncoderProduct, Workspace
from sparsepilot.ops.select import density_above, select_above, select_batch_topk, select_topk
from sparsepilot.parallel.mesh import Group


class Case(NamedTuple):
    x_BD: Tensor
    W_FD: Tensor
    bias_F: Tensor
    readers: int

    def product(
        self, tile_latents: int | None = None, half: torch.dtype | None = None, certain: bool = True
    ) -> EncoderProduct:
        return EncoderProduct(self.x_BD, self.W_FD, self.bias_F, Workspace(), tile_latents, half, certain, self.readers)

    def plain(self) -> Tensor:
        """[B, F] fp32, in fp64 inside."""
        parts = zip(self.x_BD.double().chunk(self.readers, 1), self.W_FD.double().chunk(self.readers), strict=True)
        return (torch.cat([x @ W.T for x, W in parts], dim=1) + self.bias_F.double()).float()


def integers(num_rows: int, d_in: int, d_sae: int, readers: int, shift: int, scale: float, seed: int) -> Case:
    """Small whole numbers: every product is exact in any order of adding, so sets can be compared, ties included."""
    make = torch.Generator().manual_seed(seed)
    x_BD = torch.randint(-3, 4, (num_rows, d_in * readers), generator=make).float()
    W_FD = torch.randint(-3, 4, (d_sae * readers, d_in), generator=make).float()
    bias_F = torch.randint(-4, 5, (d_sae * readers,), generator=make).float() + shift
    return Case(x_BD * scale, W_FD, bias_F * scale, readers)


def trained_like(num_rows: int = 512, d_in: int = 64, d_sae: int = 1024, outlier: float = 1.0) -> Case:
    """Sparse sums of the dictionary's own directions and noise; one row of a huge norm where `outlier` is above 1."""
    make = torch.Generator().manual_seed(0)
    W_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=make))
    codes_BF = torch.rand(num_rows, d_sae, generator=make) * (torch.rand(num_rows, d_sae, generator=make) < 16 / d_sae)
    x_BD = codes_BF @ W_FD + 0.05 * torch.randn(num_rows, d_in, generator=make)
    x_BD *= d_in**0.5 / x_BD.norm(dim=1).mean()
    x_BD[3] *= outlier
    return Case(x_BD, W_FD, 0.1 * torch.randn(d_sae, generator=make), 1)


shapes = {
    "num_rows": st.integers(1, 150),
    "d_in": st.integers(1, 8),
    "d_sae": st.sampled_from([1, 7, 16, 48, 64, 100]),
    "readers": st.sampled_from([1, 1, 2]),
    "tile": st.sampled_from([None, 1, 16, 30, 64]),
    "rows_in_tile": st.sampled_from([1, 70, 10**6]),
    "shift": st.sampled_from([-300, -5, 0, 5]),
    "scale": st.sampled_from([1.0, 1e4]),
    "half": st.sampled_from([None, torch.bfloat16]),
    "seed": st.integers(0, 2**16),
}


def make(tile, rows_in_tile, half, **sizes) -> tuple[Case, EncoderProduct]:  # type: ignore[no-untyped-def]
    case = integers(**sizes)
    product = case.product(tile, half)
    product.tile_rows = min(product.tile_rows, rows_in_tile)
    return case, product


@settings(max_examples=150, deadline=None)
@given(fraction=st.floats(0, 1), **shapes)
def test_topk_is_that_of_every_row(fraction: float, **sizes) -> None:  # type: ignore[no-untyped-def]
    case, product = make(**sizes)
    pre_BF = case.plain()
    k = 1 + round(fraction * (pre_BF.shape[1] - 1))
    top = select_topk(product, k)
    assert torch.equal(top.values_BK.sort(dim=1).values, pre_BF.topk(k).values.sort(dim=1).values)
    assert torch.equal(pre_BF.gather(1, top.ids_BK), top.values_BK)
    assert all(len(set(row)) == k for row in top.ids_BK.tolist())


@settings(max_examples=150, deadline=None)
@given(bound=st.sampled_from([0.0, 3.0, -2.0]), as_tensor=st.booleans(), **shapes)
def test_above_a_bound(bound: float, as_tensor: bool, **sizes) -> None:  # type: ignore[no-untyped-def]
    case, product = make(**sizes)
    bound *= sizes["scale"]
    pre_BF = case.plain()
    pairs = select_above(product, torch.tensor(bound) if as_tensor else bound)
    assert bool((pairs.rows_P.diff() >= 0).all())
    found_BF = torch.zeros_like(pre_BF, dtype=torch.bool)
    found_BF[pairs.rows_P, pairs.ids_P] = True
    assert torch.equal(found_BF, pre_BF > bound)
    assert pairs.ids_P.numel() == int(found_BF.sum())
    assert torch.equal(pairs.values_P, pre_BF[pairs.rows_P, pairs.ids_P])
    step = max(1, len(pre_BF) // 64)
    if product.half is None:
        assert density_above(product, bound) == pytest.approx(float((pre_BF[::step][:64] > bound).float().mean()))


@settings(max_examples=150, deadline=None)
@given(share=st.one_of(st.just(1.0), st.floats(0, 1)), **shapes)
def test_the_largest_of_a_batch(share: float, **sizes) -> None:  # type: ignore[no-untyped-def]
    case, product = make(**sizes)
    pre_BF = case.plain()
    per_row = max(0.01, share * pre_BF.shape[1])
    top = select_batch_topk(product, per_row)
    wanted = max(1, round(per_row * len(pre_BF)))
    positive = pre_BF[pre_BF > 0]
    smallest = torch.tensor(0.0) if positive.numel() < wanted else positive.topk(wanted).values.min()
    assert torch.equal(top.smallest, smallest)
    found_BF = torch.zeros_like(pre_BF, dtype=torch.bool)
    found_BF[top.pairs.rows_P, top.pairs.ids_P] = True
    assert torch.equal(found_BF, (pre_BF >= smallest) & (pre_BF > 0))  # ties all stay
    assert torch.equal(top.pairs.values_P, pre_BF[top.pairs.rows_P, top.pairs.ids_P])


@pytest.mark.parametrize("tile", [None, 96])
def test_half_precision_chooses_what_fp32_chooses_with_fp32_values(tile: int | None) -> None:
    """On data as of a trained dictionary. Rounding to bfloat16 moves a value past at most SPARE others."""
    case = trained_like()
    pre_BF, k = case.plain(), 32
    top = select_topk(case.product(tile, torch.bfloat16), k)
    torch.testing.assert_close(top.values_BK, pre_BF.gather(1, top.ids_BK), rtol=1e-5, atol=1e-5)
    kept = torch.zeros_like(pre_BF).scatter(1, top.ids_BK, 1) * torch.zeros_like(pre_BF).scatter(
        1, pre_BF.topk(k).indices, 1
    )
    assert float(kept.sum() / (k * len(pre_BF))) == 1.0
    for bound in (0.0, 0.8, torch.tensor(1.5)):
        pairs = select_above(case.product(tile, torch.bfloat16), bound)
        _equal_but_for_rounding(pre_BF, pairs.rows_P, pairs.ids_P, pairs.values_P, float(bound))
    for per_row in (0.5, 8.0, 100.0):
        batch = select_batch_topk(case.product(tile, torch.bfloat16), per_row)
        smallest = pre_BF.flatten().topk(round(per_row * len(pre_BF))).values.min()
        torch.testing.assert_close(batch.smallest, smallest, rtol=1e-5, atol=1e-6)
        _equal_but_for_rounding(pre_BF, *batch.pairs, float(smallest))


def _equal_but_for_rounding(pre_BF: Tensor, rows_P: Tensor, ids_P: Tensor, values_P: Tensor, bound: float) -> None:
    torch.testing.assert_close(values_P, pre_BF[rows_P, ids_P], rtol=1e-5, atol=1e-5)
    found_BF = torch.zeros_like(pre_BF, dtype=torch.bool)
    found_BF[rows_P, ids_P] = True
    wrong = found_BF != (pre_BF > bound)
    assert bool(((pre_BF - bound).abs()[wrong] < 1e-5).all())


@pytest.mark.parametrize("heavy", [1.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_a_half_precision_tile_holds_upper_bounds(heavy: float, scale: float) -> None:
    """Never below the exact value, not far above it; with one heavy input dimension as language models have, too."""
    case = trained_like()
    case.x_BD[:, 5] *= heavy
    case = case._replace(x_BD=case.x_BD * scale, bias_F=case.bias_F * scale)
    pre_BF = case.plain()
    product = case.product(None, torch.bfloat16)
    bounds_BF = product.tile(slice(0, len(pre_BF)), product.latent_tiles[0]).float()
    rounding_BF = product_module.U_HALF * bounds_BF.abs()
    assert bool((bounds_BF + rounding_BF >= pre_BF).all())
    norms_BF = case.x_BD.norm(dim=1, keepdim=True) * case.W_FD.norm(dim=1)
    assert bool((bounds_BF - pre_BF <= 5 * product_module.U_HALF * (norms_BF + pre_BF.abs() + case.bias_F.abs())).all())


@pytest.mark.parametrize("spare", [0, 2, 32])
def test_rows_in_doubt_are_computed_again(monkeypatch, spare: int) -> None:
    """However few candidates there are, a certain selection is that of fp32; one that need not be certain may miss."""
    from sparsepilot.ops import select

    monkeypatch.setattr(select, "SPARE_CERTAIN", spare)
    monkeypatch.setattr(select, "SPARE", 0)
    case = trained_like()
    wanted = case.plain().topk(32).values.sort(dim=1).values
    certain = select_topk(case.product(None, torch.bfloat16), 32).values_BK.sort(dim=1).values
    torch.testing.assert_close(certain, wanted, rtol=1e-6, atol=1e-6)
    missed = select_topk(case.product(None, torch.bfloat16, certain=False), 32).values_BK.sort(dim=1).values
    assert float((missed - wanted).abs().max()) > 1e-4


def test_one_huge_row_does_not_make_candidates_of_all_pairs(monkeypatch) -> None:
    """Field notes, mistake 13: one token of a huge norm must not cost memory for all pairs."""
    from sparsepilot.ops import select

    seen: list[int] = []
    original = select._exactly_above

    def counting(product: EncoderProduct, pairs: select.Pairs, bound: float | Tensor) -> select.Pairs:
        seen.append(pairs.ids_P.numel())
        return original(product, pairs, bound)

    monkeypatch.setattr(select, "_exactly_above", counting)
    case = trained_like(outlier=1000.0)
    pairs = select_above(case.product(None, torch.bfloat16), 1.5)
    assert seen[0] < 2 * pairs.ids_P.numel() + case.W_FD.shape[0]


def test_tiles_follow_the_budget(monkeypatch) -> None:
    monkeypatch.setitem(product_module.TILE_BYTES, "cpu", 4 * 100 * 30)
    case = integers(250, 4, 70, 2, 0, 1.0, 0)
    product = case.product(tile_latents=30)
    assert [(t.start, t.stop) for t in product.latent_tiles] == [
        (0, 30), (30, 60), (60, 70), (70, 100), (100, 130), (130, 140),
    ]  # fmt: skip
    assert [(t.start, t.stop) for t in product.row_tiles()] == [(0, 100), (100, 200), (200, 250)]
    whole = torch.cat([torch.cat([product.tile(r, c).clone() for c in product.latent_tiles], 1) for r in
                       product.row_tiles()])  # fmt: skip
    assert torch.equal(whole, case.plain())


class _Ranks:
    """Two threads as two ranks: collectives that wait for each other."""

    def __init__(self) -> None:
        self.barrier, self.local, self.given = threading.Barrier(2, timeout=20), threading.local(), [None, None]

    def _all(self, values: Tensor) -> list[Tensor]:
        self.given[self.local.rank] = values.clone()
        self.barrier.wait()
        parts = [given.clone() for given in self.given]
        self.barrier.wait()
        return parts

    def sum_(self, values: Tensor, group: object = None) -> Tensor:
        return values.copy_(torch.stack(self._all(values)).sum(0))

    def max_(self, values: Tensor, group: object = None) -> Tensor:
        return values.copy_(torch.stack(self._all(values)).amax(0))

    def gather(self, values: Tensor, group: object = None) -> Tensor:
        return torch.cat(self._all(values))


@pytest.mark.parametrize("per_row", [0.3, 5.0, 700.0])
def test_the_largest_of_a_batch_over_two_ranks_whose_rows_differ(monkeypatch, per_row: float) -> None:
    from sparsepilot.ops import select

    ranks = _Ranks()
    for name, fake in [("everyone", lambda: Group(2)), ("all_reduce_sum_", ranks.sum_), ("all_reduce_max_", ranks.max_),
                       ("all_gather_concat", ranks.gather)]:  # fmt: skip
        monkeypatch.setattr(select, name, fake)
    case = trained_like(num_rows=256)
    halves = [case._replace(x_BD=case.x_BD[:100]), case._replace(x_BD=3 * case.x_BD[100:])]
    found: list[select.BatchTop | None] = [None, None]

    def run(rank: int) -> None:
        ranks.local.rank = rank
        found[rank] = select_batch_topk(halves[rank].product(), per_row)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pre = torch.cat([half.plain() for half in halves])
    wanted = round(per_row * len(pre))
    smallest = pre.flatten().topk(wanted).values.min().clamp_min(0)
    for top in found:
        assert top is not None
        torch.testing.assert_close(top.smallest, smallest)
    assert sum(top.pairs.ids_P.numel() for top in found) == min(wanted, int((pre > 0).sum()))
