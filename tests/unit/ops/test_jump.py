"""JumpReLU's straight-through gradients against the published formulas, restated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepilot.ops.jump import jump, step


def _inputs(seed: int, num_rows: int, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    theta_F = (0.05 + torch.rand(6, generator=make)).requires_grad_()
    pre_BF = theta_F.detach() + 2 * bandwidth * (torch.rand(num_rows, 6, generator=make) - 0.5)
    return pre_BF.requires_grad_(), theta_F, torch.randn(num_rows, 6, generator=make)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), num_rows=st.integers(1, 20), bandwidth=st.sampled_from([1e-3, 0.1, 2.0]))
def test_gradients_are_the_published_ones(seed: int, num_rows: int, bandwidth: float) -> None:
    pre_BF, theta_F, weight_BF = _inputs(seed, num_rows, bandwidth)
    above = (pre_BF > theta_F).float()
    K = (((pre_BF - theta_F) / bandwidth).abs() < 0.5).float()  # the rectangle of equations 11 and 12

    for to_pre in (False, True):
        out = jump(pre_BF, theta_F, bandwidth, to_pre)
        assert torch.equal(out, pre_BF * above)
        by_pre, by_theta = torch.autograd.grad(out, [pre_BF, theta_F], weight_BF)
        torch.testing.assert_close(by_pre, weight_BF * (above + to_pre * theta_F / bandwidth * K))
        torch.testing.assert_close(
            by_theta, -(weight_BF * theta_F / bandwidth * K).sum(0), rtol=1e-5, atol=1e-5 / bandwidth
        )
    out = step(pre_BF, theta_F, bandwidth)
    assert torch.equal(out, above)
    by_pre, by_theta = torch.autograd.grad(out, [pre_BF, theta_F], weight_BF, allow_unused=True, materialize_grads=True)
    assert not by_pre.any()
    torch.testing.assert_close(by_theta, -(weight_BF / bandwidth * K).sum(0), rtol=1e-5, atol=1e-5 / bandwidth)


@pytest.mark.parametrize(
    "function", [lambda pre, theta: jump(pre, theta, 0.2, False), lambda pre, theta: step(pre, theta, 0.2)]
)
def test_both_sides_of_the_threshold_count(function) -> None:
    """Field notes, mistake 3: with the kernel on the values after the jump, only the upper half would be left."""
    theta = torch.tensor([1.0], requires_grad=True)
    pre = torch.linspace(0.85, 1.15, 301)[:, None]
    grads = [float(torch.autograd.grad(function(part, theta).sum(), theta)[0]) for part in (pre, pre[pre > 1][:, None])]
    assert grads[0] == pytest.approx(2 * grads[1], rel=0.02)
    assert grads[1] < 0


def test_the_mean_gradient_is_the_derivative_of_the_mean() -> None:
    """What the kernel estimates: d/d theta of E[pre H] is -theta p(theta), of E[H] -p(theta)."""
    theta = torch.tensor([0.7], requires_grad=True)
    pre = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)) * 2  # density 1/2
    assert float(torch.autograd.grad(jump(pre, theta, 0.1, False).mean(), theta)[0]) == pytest.approx(-0.35, rel=0.05)
    assert float(torch.autograd.grad(step(pre, theta, 0.1).mean(), theta)[0]) == pytest.approx(-0.5, rel=0.05)
