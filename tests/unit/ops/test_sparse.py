"""The sparse step against its dense twin: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepilot.ops.active import ActiveSet
from sparsepilot.ops.sparse import at_pairs, decode_at, decode_plain, encode_at
from sparsepilot.ops.topk import topk_grouped, topk_plain


def parameters(d_in: int, d_out: int, d_sae: int, seed: int, readers: int, dtype: torch.dtype) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = [(d_sae, d_in // readers), (d_sae,), (d_in,), (d_sae, d_out), (d_sae,)]
    return [torch.randn(*shape, generator=make, dtype=dtype).requires_grad_() for shape in shapes]


def pre_plain(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor, readers: int) -> Tensor:
    """Every pre-activation, restated: latent i reads the columns of the site that its part belongs to."""
    d_sae, width = W_enc_FD.shape
    full_FD = torch.zeros(d_sae, width * readers, dtype=x_BD.dtype)
    parts = []
    for i in range(d_sae):
        reader = i // (d_sae // readers)
        parts.append(torch.nn.functional.pad(W_enc_FD[i], (reader * width, (readers - reader - 1) * width)))
    full_FD = torch.stack(parts)
    return (x_BD - b_in_D) @ full_FD.T + b_enc_F


def chosen(num_rows: int, d_sae: int, density: float, seed: int) -> Tensor:
    """[B, F] bool: rows with different numbers of pairs, some of them with none."""
    make = torch.Generator().manual_seed(seed)
    share_B1 = density * torch.rand(num_rows, 1, generator=make) * (torch.rand(num_rows, 1, generator=make) > 0.3)
    return torch.rand(num_rows, d_sae, generator=make) < share_B1


def both(
    x_BD: Tensor, params: list[Tensor], keep_BF: Tensor, target_BD: Tensor, readers: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(loss, y) sparsely and densely; the pre-activations are used twice, so that their own gradient counts, too
    (field notes, mistake 1)."""
    W_enc_FD, b_enc_F, b_in_D, W_dec_FD, norms_F = params
    rows_P, ids_P = keep_BF.nonzero(as_tuple=True)
    active = ActiveSet.from_pairs(rows_P, ids_P, len(x_BD), len(W_enc_FD))
    pre_BF = pre_plain(x_BD, W_enc_FD, b_enc_F, b_in_D, readers)
    pre_P = encode_at(x_BD, W_enc_FD, b_enc_F, b_in_D, pre_BF.detach()[rows_P, ids_P], active, readers)
    y_BD = decode_at(pre_P.relu(), W_dec_FD, active)
    fast = (y_BD - target_BD).square().sum() + (pre_P.pow(3) * at_pairs(norms_F, active)).sum()
    plain_BD = decode_plain(pre_BF.relu() * keep_BF, W_dec_FD)
    plain = (plain_BD - target_BD).square().sum() + (pre_BF.pow(3) * norms_F * keep_BF).sum()
    return (fast, y_BD), (plain, plain_BD)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 20),
    per_reader=st.integers(1, 30),
    readers=st.sampled_from([1, 1, 2, 3]),
    density=st.sampled_from([0.0, 0.1, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_equal_the_dense_twin(
    num_rows: int, d_in: int, d_out: int, per_reader: int, readers: int, density: float, seed: int
) -> None:
    params = parameters(d_in * readers, d_out, per_reader * readers, seed, readers, torch.float32)
    make = torch.Generator().manual_seed(seed + 1)
    x_BD = torch.randn(num_rows, d_in * readers, generator=make).requires_grad_()
    target_BD = torch.randn(num_rows, d_out, generator=make)
    keep_BF = chosen(num_rows, per_reader * readers, density, seed)
    (fast, y_BD), (plain, plain_BD) = both(x_BD, params, keep_BF, target_BD, readers)
    torch.testing.assert_close(y_BD, plain_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)
    fast_grads = torch.autograd.grad(fast, [x_BD, *params])
    plain_grads = torch.autograd.grad(plain, [x_BD, *params])
    for mine, theirs in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max() + 1))


@pytest.mark.parametrize("readers", [1, 2])
def test_gradcheck_in_float64(readers: int) -> None:
    params = parameters(4, 3, 6, 0, readers, torch.float64)
    x_BD = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    keep_BF = torch.tensor([[1, 0, 0, 0, 0, 1], [0] * 6, [0, 1, 0, 1, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]]).bool()
    rows_P, ids_P = keep_BF.nonzero(as_tuple=True)
    active = ActiveSet.from_pairs(rows_P, ids_P, 5, 6)

    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_in: Tensor, W_dec: Tensor, norms: Tensor) -> Tensor:
        values_P = pre_plain(x, W_enc, b_enc, b_in, readers).detach()[rows_P, ids_P]
        pre_P = encode_at(x, W_enc, b_enc, b_in, values_P, active, readers)
        return decode_at(pre_P * at_pairs(norms, active), W_dec, active)

    assert torch.autograd.gradcheck(step, (x_BD, *params))


def test_gradients_have_the_same_bits_every_time() -> None:
    params = parameters(32, 32, 512, 3, 2, torch.float32)
    x_BD = torch.randn(256, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
    keep_BF = chosen(256, 512, 0.1, 5)

    def gradients() -> list[Tensor]:
        (loss, _), _ = both(x_BD, params, keep_BF, x_BD.detach(), 2)
        return list(torch.autograd.grad(loss, [x_BD, *params]))

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_both_views_of_the_active_set_hold_the_same_pairs() -> None:
    keep_BF = chosen(30, 50, 0.3, 0)
    rows_P, ids_P = keep_BF.nonzero(as_tuple=True)
    active = ActiveSet.from_pairs(rows_P, ids_P, 30, 50)
    by_rows = ActiveSet(ids_P, active.offsets_B, 50)  # rows found from the offsets alone
    assert torch.equal(by_rows.rows_P, rows_P)
    by_latent = active.by_latent()
    pairs = list(zip(ids_P[by_latent.order_P].tolist(), by_latent.rows_P.tolist(), strict=True))
    assert pairs == [(i, b) for b, i in sorted(keep_BF.nonzero().tolist(), key=lambda pair: (pair[1], pair[0]))]
    assert by_latent.offsets_F.tolist() == [0, *keep_BF.sum(0).cumsum(0)[:-1].tolist()]


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 8),
    width=st.integers(1, 300),
    group_size=st.sampled_from([2, 8, 16, 32]),
    fraction=st.floats(0, 1),
    num_distinct=st.sampled_from([3, 10**9]),
    seed=st.integers(0, 2**16),
)
def test_grouped_topk_is_exact(
    num_rows: int, width: int, group_size: int, fraction: float, num_distinct: int, seed: int
) -> None:
    k = 1 + round(fraction * (width - 1))
    make = torch.Generator().manual_seed(seed)
    # few distinct values make ties, where the ids may differ and the values may not
    pre_BF = torch.randint(-num_distinct, num_distinct, (num_rows, width), generator=make).float()
    fast, plain = topk_grouped(pre_BF, k, group_size), topk_plain(pre_BF, k)
    assert torch.equal(fast.values_BK.sort(dim=1).values, plain.values_BK.sort(dim=1).values)
    assert torch.equal(pre_BF.gather(1, fast.ids_BK), fast.values_BK)
    assert all(len(set(row)) == k for row in fast.ids_BK.tolist())
