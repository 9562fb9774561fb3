"""Resampling: where it writes, what it forgets, and that it brings latents back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shapes import moment

from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.jumprelu import JumpReLU
from sparsepilot.autoencoders.relu import ReLU
from sparsepilot.autoencoders.topk import TopK
from sparsepilot.callbacks.checkpoint_io import list_checkpoints
from sparsepilot.parallel.surgery import set_rows_
from sparsepilot.training.resample import resample


def trained_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "make", [lambda: TopK(Blocks.autoencoder(6), 20, 3), lambda: ReLU(Blocks.autoencoder(6), 20, 1.0)]
)
def test_dead_latents_point_at_bad_rows_and_their_moments_are_gone(make) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = trained_optimizer(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x_BD = torch.randn(50, 6)
    sq_error_B = torch.zeros(50)
    sq_error_B[[7, 31]] = torch.tensor([2.0, 3.0])  # the only rows with a loss
    dead = torch.tensor([2, 5, 11])
    assert resample(model, dead, x_BD, x_BD, sq_error_B, 0.2, 0, 4096, optimizer) == 2
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[dead[:2]] = False
    for name in ("W_enc", "W_dec", "b_enc"):
        now = dict(model.named_parameters())[name]
        assert torch.equal(now[untouched], before[name][untouched])
        moments = optimizer.state[now]
        assert float(moments["exp_avg"][dead[:2]].abs().max()) == 0.0
        assert float(moments["exp_avg"][untouched].abs().min()) > 0.0
    centred = torch.nn.functional.normalize(x_BD[[7, 31]] - model.b_dec.detach(), dim=1)
    rows = torch.nn.functional.normalize(model.W_dec.detach()[dead[:2]], dim=1)
    assert sorted((rows @ centred.T).argmax(dim=1).tolist()) == [0, 1]
    torch.testing.assert_close((rows @ centred.T).amax(dim=1), torch.ones(2))
    living = before["W_enc"][[i for i in range(20) if i not in dead]].norm(dim=1).mean()
    torch.testing.assert_close(model.W_enc.detach()[dead[:2]].norm(dim=1), (0.2 * living).expand(2))
    assert float(model.b_enc.detach()[dead[:2]].abs().max()) == 0.0


def test_thresholds_that_begin_anew_have_not_moved() -> None:
    """The controller tells by their motion whether the penalty rules them."""
    model = JumpReLU(Blocks.autoencoder(6), 20, 1.0)
    with torch.no_grad():
        model.log_threshold.add_(torch.arange(20) * 0.1)
    model.close_step({}, moment(model))
    x_BD = torch.randn(50, 6)
    dead, optimizer = torch.tensor([2, 5]), trained_optimizer(model)
    assert resample(model, dead, x_BD, x_BD, torch.ones(50), 0.2, 0, 4096, optimizer) == 2
    with torch.no_grad():
        model.log_threshold.add_(torch.tensor([0.01, -0.01]).repeat(10))
    model.close_step({}, moment(model))
    assert abs(float(model.threshold_coherence())) < 1e-3


def test_rows_are_drawn_by_squared_loss_and_from_the_clock() -> None:
    model = TopK(Blocks.autoencoder(2), 4, 1)
    x_BD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def direction(samples: int, seed: int = 0) -> int:
        resample(model, torch.tensor([0]), x_BD, x_BD, torch.tensor([1.0, 3.0]), 0.2, seed, samples, optimizer)
        return int(model.W_dec.detach()[0].argmax())

    optimizer = trained_optimizer(model)
    drawn = [direction(samples) for samples in range(2000)]
    assert abs(sum(drawn) / 2000 - 0.9) < 0.03  # 9 : 1
    assert drawn[:50] == [direction(samples) for samples in range(50)]
    assert drawn[:50] != [direction(samples, seed=1) for samples in range(50)]


def test_surgery_writes_to_the_parameter_itself() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = trained_optimizer(torch.nn.ParameterList([parameter]))
    set_rows_(parameter, torch.tensor([1, 3]), torch.full((2, 2), 7.0), optimizer)
    assert parameter.detach()[[1, 3]].eq(7).all()
    assert not parameter.detach()[[0, 2, 4]].eq(7).any()


@pytest.mark.slow  # two runs of 100 steps and half a one
def test_resampling_brings_latents_back_and_resumes_bit_for_bit(train_tiny, tmp_path: Path) -> None:
    words = (
        "model.d_sae=256",
        "model.k=2",
        "optimizer.lr=5e-3",
        "samples=25600",
        "callbacks.checkpoint_every_samples=6400",
    )
    words = (*words, "callbacks.keep_last=10")
    resampled = ("model/revival=resample", "model.revival.encoder_scale=1.0")
    without = train_tiny(*words, "model/revival=none", f"run_dir={tmp_path}/none")
    whole = train_tiny(*words, *resampled, f"run_dir={tmp_path}/whole")
    assert without["metrics"]["train/dead_latents"] > 20
    assert whole["metrics"]["train/dead_latents"] < 0.5 * without["metrics"]["train/dead_latents"]

    final = (tmp_path / "whole" / "sae.safetensors").read_bytes()
    for samples, path in list_checkpoints(tmp_path / "whole" / "checkpoints"):
        if samples > 12800:
            path.unlink()
    assert list_checkpoints(tmp_path / "whole" / "checkpoints")
    train_tiny(*words, *resampled, f"run_dir={tmp_path}/whole")
    assert (tmp_path / "whole" / "sae.safetensors").read_bytes() == final
