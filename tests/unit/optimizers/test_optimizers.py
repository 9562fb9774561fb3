"""Each optimizer beside a plain restatement, to the bit; groups; what a checkpoint brings back; each in a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from shapes import ARCHITECTURES, make
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsepilot.config.check import check
from sparsepilot.errors import ConfigError
from sparsepilot.optimizers.muon import MuonWithAdam
from sparsepilot.optimizers.sign import SignDescent

Make = Callable[[list[dict[str, Any]]], Optimizer]
SHAPES = ((12, 5), (12,), (5, 12), (5,))  # W_enc, b_enc, W_dec, b_dec
NUM_STEPS = 6


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    """One latent in three has none, as where it did not fire."""
    torch.manual_seed(1 + step)
    return [torch.randn(shape) * (torch.arange(shape[0]) % 3 != step % 3).reshape(-1, *[1] * (len(shape) - 1))
            for shape in SHAPES]  # fmt: skip


def advance(params: list[nn.Parameter], *optimizers: Optimizer, steps: range = range(NUM_STEPS)) -> None:
    """Steps at a learning rate that moves, set as the training module does."""
    for step in steps:
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step) * group.get("lr_scale", 1.0)
            optimizer.step()


def assert_same_bits(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for shape, a, b in zip(SHAPES, ours, theirs, strict=True):
        assert torch.equal(a, b), shape


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in (key, *leaves(value))]
    return [leaf for value in tree for leaf in leaves(value)] if isinstance(tree, list | tuple) else [tree]


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Both kinds of parameters in a group, and a group with a rate and options of its own."""
    return [{"params": params[:2]}, {"params": params[2:], "lr_scale": 0.5, "betas": (0.0, 0.999)}]


def test_muon_moves_matrices_and_adam_the_rest_to_the_bit() -> None:
    ours, theirs = parameters(), parameters()
    mixed = MuonWithAdam(two_groups(ours), momentum=0.9, weight_decay=0.1, betas=(0.8, 0.99))
    w_enc, b_enc, w_dec, b_dec = theirs
    muon = torch.optim.Muon([{"params": [w_enc]}, {"params": [w_dec], "lr_scale": 0.5}],
                            momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")  # fmt: skip
    adam = torch.optim.Adam([{"params": [b_enc]}, {"params": [b_dec], "lr_scale": 0.5, "betas": (0.0, 0.999)}],
                            betas=(0.8, 0.99), fused=True)  # fmt: skip
    advance(ours, mixed)
    advance(theirs, muon, adam)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("kinds", ["matrices", "vectors"])
def test_muon_with_adam_takes_parameters_of_one_kind(kinds: str) -> None:
    ours, theirs = ([p for p in parameters() if (p.ndim == 2) == (kinds == "matrices")] for _ in range(2))
    own = torch.optim.Muon(theirs, weight_decay=0, adjust_lr_fn="match_rms_adamw") if kinds == "matrices" \
        else torch.optim.Adam(theirs)  # fmt: skip
    for params, optimizer in ((ours, MuonWithAdam(ours)), (theirs, own)):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_matrix_moves_as_much_as_a_vector_at_one_learning_rate() -> None:
    """Why match_rms_adamw: root mean square of an entry's update, 0.2 lr against Adam's lr at its first step."""
    moved = {}
    for shape in ((512, 64), (64, 512), (512,)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        MuonWithAdam([p], lr=1e-3).step()
        moved[shape] = float(p.detach().square().mean().sqrt())
    assert moved[512,] == pytest.approx(1e-3, rel=1e-3)
    assert moved[512, 64] == pytest.approx(moved[64, 512], rel=0.05) == pytest.approx(2e-4, rel=0.3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sign_descent_is_its_formula_to_the_bit(momentum: float, weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    advance(ours, SignDescent(two_groups(ours), momentum=momentum, weight_decay=weight_decay))
    averages = [torch.zeros(shape) for shape in SHAPES]
    with torch.no_grad():
        for step in range(NUM_STEPS):
            for i, grad in enumerate(gradients(step)):
                lr = 1e-2 / (1 + step) * (1.0 if i < 2 else 0.5)
                averages[i] = torch.lerp(averages[i], grad, 1 - momentum)
                theirs[i].mul_(1 - lr * weight_decay).sub_(averages[i].sign(), alpha=lr)
    assert_same_bits(ours, theirs)


def test_without_momentum_a_latent_without_gradient_stands_still() -> None:
    ours, before = parameters(), parameters()
    advance(ours, SignDescent(two_groups(ours), momentum=0.0), steps=range(1))
    for p, was in zip(ours, before, strict=True):
        assert torch.equal(p[::3], was[::3])
        assert not (p[1::3] == was[1::3]).any()


@pytest.mark.parametrize(
    "make",
    [MuonWithAdam, SignDescent, lambda groups: SignDescent(groups, momentum=0.0),
     lambda groups: torch.optim.Adam(groups, fused=True), lambda groups: torch.optim.AdamW(groups, fused=True)],
    ids=["muon", "signum", "sign", "adam", "adamw"],
)  # fmt: skip
def test_a_state_brought_back_goes_on_to_the_bit(make: Make) -> None:
    """Groups with options of their own included; the file is read as checkpoints are."""
    whole, cut = parameters(), parameters()
    advance(whole, make(two_groups(whole)))
    optimizer = make(two_groups(cut))
    advance(cut, optimizer, steps=range(3))
    file = io.BytesIO()
    torch.save([[p.detach() for p in cut], optimizer.state_dict()], file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    params = [nn.Parameter(value) for value in values]
    optimizer = make(two_groups(params))
    optimizer.load_state_dict(state)
    advance(params, optimizer, steps=range(3, NUM_STEPS))
    assert_same_bits(params, whole)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "conf" / "optimizer").glob("*.yaml")))
def test_every_optimizer_trains_and_resumes_to_the_bit(train_tiny, tmp_path: Path, name: str) -> None:
    """The contract: a new file in conf/optimizer is tested without an edit here."""
    # who is dead hangs on the budget, which is another before the resume: no AuxK
    options = (f"optimizer={name}", "callbacks.validate_every_samples=2560", "model/revival=none")
    train_tiny(f"run_dir={tmp_path}/whole", *options)
    for samples in (2560, 5120):
        summary = train_tiny(f"run_dir={tmp_path}/cut", f"samples={samples}", *options)
    whole, cut = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "cut")
    )
    for part in ("state_dict", "optimizer_states"):
        for a, b in zip(leaves(whole[part]), leaves(cut[part]), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    exported = [(tmp_path / run / "sae.safetensors").read_bytes() for run in ("whole", "cut")]
    assert exported[0] == exported[1]
    assert summary["samples"] == 5120
    assert 0 < summary["metrics"]["val/fvu"] < 1


@pytest.mark.parametrize("name", ["muon", "sign"])
def test_a_momentum_that_never_forgets_is_refused(compose_cfg, name: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.momentum = 1.0: should be less than 1"):
        check(compose_cfg(f"optimizer={name}", "optimizer.momentum=1.0"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, MuonWithAdam])
def test_biases_and_thresholds_do_not_decay(architecture: str, make_optimizer: Callable[..., Optimizer]) -> None:
    """b_dec holds the mean of the data; a decayed threshold would be a controller of its own."""
    model = make(architecture, "transcoder")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model.parameter_groups(), lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    stayed = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert stayed == {name for name in before if before[name].ndim == 1}
    assert len(stayed) < len(before)
