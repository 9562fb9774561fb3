"""The sparse step against its dense twin: values and gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepilot.ops.active import ActiveSet
from sparsepilot.ops.sparse import decode_at, decode_at_plain, encode_at, encode_at_plain
from sparsepilot.ops.topk import topk_grouped, topk_plain


def parameters(d_in: int, d_sae: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = [(d_sae, d_in), (d_sae,), (d_in,), (d_sae, d_in)]
    return [torch.randn(*shape, generator=make, dtype=dtype).requires_grad_() for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    d_in=st.integers(1, 24),
    d_sae=st.integers(1, 70),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_equal_the_dense_twin(
    num_rows: int, d_in: int, d_sae: int, fraction: float, seed: int
) -> None:
    k = 1 + round(fraction * (d_sae - 1))
    W_enc_FD, b_enc_F, b_dec_D, W_dec_FD = params = parameters(d_in, d_sae, seed)
    x_BD = torch.randn(num_rows, d_in, generator=torch.Generator().manual_seed(seed + 1)).requires_grad_()
    target_BD = torch.randn(num_rows, d_in, generator=torch.Generator().manual_seed(seed + 2))
    pre_BF = ((x_BD - b_dec_D) @ W_enc_FD.T + b_enc_F).detach()
    top = topk_grouped(pre_BF, k)
    active = ActiveSet(top.ids_BK, d_sae)

    # a second use of the pre-activations, so that their own gradient counts (field notes, mistake 1)
    pre_BK = encode_at(x_BD, W_enc_FD, b_enc_F, b_dec_D, top.values_BK, active)
    fast = (decode_at(pre_BK.relu(), W_dec_FD, active) + b_dec_D - target_BD).square().sum() + pre_BK.pow(3).sum()
    pre_BK = encode_at_plain(x_BD, W_enc_FD, b_enc_F, b_dec_D, top.ids_BK)
    plain = (decode_at_plain(pre_BK.relu(), W_dec_FD, top.ids_BK) + b_dec_D - target_BD).square().sum()
    plain = plain + pre_BK.pow(3).sum()

    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    fast_grads = torch.autograd.grad(fast, [x_BD, *params])
    plain_grads = torch.autograd.grad(plain, [x_BD, *params])
    for mine, theirs in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max() + 1))


def test_gradcheck_in_float64() -> None:
    W_enc_FD, b_enc_F, b_dec_D, W_dec_FD = parameters(3, 6, 0, torch.float64)
    x_BD = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids_BK = torch.tensor([[0, 5], [2, 5], [1, 3], [4, 0]])
    active = ActiveSet(ids_BK, 6)

    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor) -> Tensor:
        pre_BK = encode_at(x, W_enc, b_enc, b_dec, encode_at_plain(x, W_enc, b_enc, b_dec, ids_BK).detach(), active)
        return decode_at(pre_BK, W_dec, active)

    assert torch.autograd.gradcheck(step, (x_BD, W_enc_FD, b_enc_F, b_dec_D, W_dec_FD))


def test_gradients_have_the_same_bits_every_time() -> None:
    W_enc_FD, b_enc_F, b_dec_D, W_dec_FD = params = parameters(32, 512, 3)
    x_BD = torch.randn(256, 32, generator=torch.Generator().manual_seed(4))
    top = topk_plain(((x_BD - b_dec_D) @ W_enc_FD.T + b_enc_F).detach(), 8)

    def gradients() -> list[Tensor]:
        active = ActiveSet(top.ids_BK, 512)
        codes_BK = encode_at(x_BD, W_enc_FD, b_enc_F, b_dec_D, top.values_BK, active).relu()
        loss = (decode_at(codes_BK, W_dec_FD, active) + b_dec_D - x_BD).square().sum()
        return list(torch.autograd.grad(loss, params))

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


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
