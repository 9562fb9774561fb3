"""Every architecture with its options, on every kind of blocks: what the tests here and in tests/parity share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.batchtopk import BatchTopK
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.gated import Gated
from sparsepilot.autoencoders.jumprelu import JumpReLU
from sparsepilot.autoencoders.relu import ReLU
from sparsepilot.autoencoders.step import Moment
from sparsepilot.autoencoders.topk import TopK

B, F = 70, 96
SAMPLES, BATCH, TOTAL = 2000, 100, 10_000

DENSE_ABOVE = 1 / 24
"""Of the models that `make` makes; a test may change it, so that they take the sparse (1.0) or the dense path (0.0)."""

Make = Callable[..., Autoencoder]

ARCHITECTURES: dict[str, Make] = {
    "topk": lambda blocks, **common: TopK(blocks, F, 4, **common),
    "topk-multi": lambda blocks, **common: TopK(blocks, F, 4, multi_topk=0.125, **common),
    "topk-annealed": lambda blocks, **common: TopK(blocks, F, 4, anneal_k_from=24, anneal_k_fraction=0.5, **common),
    "batchtopk": lambda blocks, **common: BatchTopK(blocks, F, 4.5, **common),
    "relu-l1": lambda blocks, **common: ReLU(blocks, F, 0.3, **common),
    "relu-tanh": lambda blocks, **common: ReLU(blocks, F, 0.3, penalty="tanh", **common),
    "relu-log": lambda blocks, **common: ReLU(blocks, F, 0.3, penalty="log", rescale=True, **common),
    "relu-p": lambda blocks, **common: ReLU(blocks, F, 0.3, penalty="p", p_start_fraction=0.0, **common),
    "jumprelu-step": lambda blocks, **common: JumpReLU(blocks, F, 0.3, threshold=0.2, bandwidth=0.2, **common),
    "jumprelu-tanh": lambda blocks, **common: JumpReLU(blocks, F, 0.3, recipe="tanh", bandwidth=0.6, **common),
    "jumprelu-target": lambda blocks, target=3.0, **common: JumpReLU(
        blocks, F, 0.3, threshold=0.2, bandwidth=0.2, target_l0=target, **common
    ),
    "gated": lambda blocks, **common: Gated(blocks, F, 0.3, **common),
}

BLOCKS: dict[str, Blocks] = {
    "autoencoder": Blocks.autoencoder(12),
    "crosscoder": Blocks.autoencoder(5, 8),
    "transcoder": Blocks((6, 5), (9,), same=False),
    "transcoder-skip": Blocks((6,), (9, 4), same=False, skip=True),
    "cross-layer": Blocks((6, 6, 6), (5, 5, 7), same=False, cross_layer=True),
}


def make(architecture: str, blocks: str | Blocks, seed: int = 0, **common: Any) -> Autoencoder:
    """A model whose parameters all differ from their start, as in the middle of a run."""
    torch.manual_seed(seed)
    common.setdefault("dense_above", DENSE_ABOVE)
    model = ARCHITECTURES[architecture](BLOCKS[blocks] if isinstance(blocks, str) else blocks, **common)
    with torch.no_grad():
        model.initialise(0.1 * torch.randn(model.d_in), 0.1 * torch.randn(model.d_out), 7.0)
        for name, parameter in model.named_parameters():
            parameter.add_({"W_skip": 0.2, "log_threshold": 0.2}.get(name, 0.1) * torch.randn_like(parameter))
        model.b_enc.sub_(0.1)
        if model._decoder_mask is not None:
            model.W_dec.mul_(model._decoder_mask)
        model.after_step()
        if model.rescaling is not None:
            model.rescaling.products_2.copy_(torch.tensor([2.0, 2.6]))
    return model


def rows(model: Autoencoder, num_rows: int = B, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    make_rows = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(num_rows, model.d_in, generator=make_rows)
    if model.blocks.same:
        return x_BD, x_BD
    return x_BD, torch.randn(num_rows, model.d_out, generator=make_rows)


def moment(model: Autoencoder, dead: Tensor | None = None, **changes: Any) -> Moment:
    """A fifth into the run."""
    dead_ids_A = torch.empty(0, dtype=torch.int64) if dead is None else dead
    now = Moment(model.knob.initial, SAMPLES, BATCH, TOTAL, dead_ids_A, torch.tensor(3.0))
    return now._replace(**changes)


def dead_ids(num_dead: int, seed: int = 2) -> Tensor:
    """Some latents, ascending."""
    return torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:num_dead].sort().values


def gradients(model: Autoencoder, loss: Tensor) -> dict[str, Tensor]:
    """By parameter; zeros where the loss does not reach."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_same(mine: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest entry."""
    assert mine.shape == theirs.shape, what
    error = float((mine.double() - theirs.double()).abs().max()) if mine.numel() else 0.0
    largest = float(theirs.double().abs().max()) if mine.numel() else 0.0
    assert error <= tolerance * max(largest, 1e-3), f"{what}: differs by {error:.2e}, largest is {largest:.2e}"


def pre_of(model: Autoencoder, x_BD: Tensor) -> Tensor:
    return (x_BD - model.b_in) @ model.W_enc.T + model.b_enc


def norms_of(model: Autoencoder) -> Tensor:
    """||W_dec[i]||; of a crosscoder the sum over its sites (Lindsey et al. 2024)."""
    return sum(part.norm(dim=1) for part in model.W_dec.split(model.blocks.write_widths, dim=1))  # type: ignore[return-value]


def top_codes(pre_BF: Tensor, k: int) -> Tensor:
    """TopK(ReLU(pre))"""
    kth = pre_BF.detach().topk(k).values[:, -1:]
    return pre_BF.relu() * (pre_BF >= kth)


def mse(y_BD: Tensor, y_hat_BD: Tensor) -> Tensor:
    return ((y_BD - y_hat_BD) ** 2).sum(1).mean()


def assert_trains_by(model: Autoencoder, mine: Tensor, theirs: Tensor) -> None:
    """The loss, and the gradient of every parameter."""
    assert_same(mine.detach(), theirs.detach(), "loss")
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, mine).items():
        assert_same(gradient, expected[name], name, 2e-5)
