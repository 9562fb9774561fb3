"""Mistakes found in other tools (field notes, section 4): each has a test that would catch it here.

| mistake | test |
|---|---|
| 1 backward ignores the gradient of pre-activations | below; parity/test_topk.py, _aux_k.py; unit/ops/test_sparse.py |
| 2 resampling writes to a copy | unit/training/test_resample.py |
| 3 JumpReLU's kernel on post-activations | unit/ops/test_jump.py, parity/test_jumprelu.py |
| 4 a second look at the loss moves state | below; unit/autoencoders/test_edges.py |
| 5 AuxK counts b_dec twice | below; parity/test_aux_k.py |
| 6, 7, 8 data position, input scale, ranks | tests/e2e, tests/property, unit/data |
| 10 variance about zero, MSE in other units | below; unit/metrics; unit/training/test_module.py |
| 11 dead after some number of batches | below; unit/metrics, unit/training/test_module.py |
| 12 a GradScaler that skips steps | unit/config/test_check.py: float16 is refused |
| 13 tokens of a huge norm | unit/autoencoders/test_edges.py, unit/ops/test_select.py (cost); the mask is unit/lm's |
| 14 thresholds in bf16 | below; unit/training/test_runs.py |
"""

from __future__ import annotations

import pytest
import torch
from shapes import ARCHITECTURES, B, dead_ids, gradients, make, moment, rows
from torch import Tensor

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.batchtopk import BatchTopK
from sparsepilot.autoencoders.jumprelu import JumpReLU
from sparsepilot.autoencoders.revival import AuxK
from sparsepilot.controllers.constant import Constant
from sparsepilot.training.trainee import Sites, SiteStats, Trainee
from sparsepilot.training.validation import Validation


def trainee_of(model: Autoencoder, x_BD: Tensor, total_samples: int = 10_000, batch: int = 100) -> Trainee:
    """On one site whose statistics are those of `x_BD`."""
    scale = float((x_BD.shape[1] / x_BD.square().sum(1).mean()) ** 0.5)
    site = SiteStats("site", slice(0, x_BD.shape[1]), x_BD.mean(0), x_BD.var(0, correction=0), scale)
    return Trainee(model, Constant(), Sites([site], None), total_samples, batch)


@pytest.mark.parametrize("path", [1.0, 0.0])
def test_1_auxiliary_losses_train_the_encoder(path: float) -> None:
    model = make("topk", "autoencoder", dense_above=path, revival=AuxK(3, 1.0))
    x_BD, y_BD = rows(model)
    dead = dead_ids(40)
    with torch.no_grad():
        model.b_enc[dead] -= 100.0  # never among the top, so only AuxK reaches them ...
        model.b_enc[dead[:20]] += 99.0  # ... and only these are ever above zero
    trained_F = gradients(model, model(x_BD, y_BD, moment(model, dead)).loss)["W_enc"].any(dim=1)
    without_F = gradients(model, model(x_BD, y_BD, moment(model)).loss)["W_enc"].any(dim=1)
    assert not without_F[dead].any()
    assert int(trained_F[dead[:20]].sum()) > 10
    assert not trained_F[dead[20:]].any()

    model = make("topk-multi", "autoencoder", dense_above=path)
    before, after = (gradients(m, m(x_BD, y_BD, moment(m)).loss)["W_enc"] for m in (make("topk", "autoencoder"), model))
    assert int((before != after).any(dim=1).sum()) > 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_4_only_the_end_of_a_step_moves_state(architecture: str) -> None:
    """Validation in between, and the loss once more, leave the run as it is: the next step has the same bits."""
    model = make(architecture, "autoencoder", revival=AuxK(3))
    x_BD, _ = rows(model)
    trainee = trainee_of(model, x_BD)

    def take_step(samples: int, micro_batches: int) -> None:
        for part in x_BD.chunk(micro_batches):
            trainee(part, samples)
        trainee.reduce()
        trainee.advance(samples)

    def state() -> dict[str, Tensor]:
        return {name: t.clone() for name, t in trainee.state_dict().items() if isinstance(t, Tensor)}

    take_step(100, 1)
    before = state()
    validation = Validation(trainee, rows_per_pass=1000)
    validation.update(x_BD)
    validation.finish(100)
    with torch.no_grad():
        model(*trainee.scaled(x_BD), trainee._now(200))
    assert all(torch.equal(value, before[name]) for name, value in state().items())
    assert float(trainee.sums_S.abs().sum()) == 0

    if isinstance(model, BatchTopK):  # an average moves once in an optimizer step, whatever the number of micro-batches
        model.threshold.fill_(2.0)
        take_step(200, 4)
        share = (2.0 - float(model.threshold)) / 2.0
        assert 0 < share < 0.01


def test_5_aux_k_does_not_decode_b_dec_again() -> None:
    """With a b_dec that explains everything, dead latents have nothing left to explain, and decode to nothing."""
    model = make("topk", "autoencoder", revival=AuxK(3, 1.0))
    y_BD = model.b_dec.detach().expand(B, -1).clone()
    with torch.no_grad():
        model.b_dec.mul_(100.0)
        model.W_enc.zero_()
        model.b_enc.zero_()
    step = model(100 * y_BD, 100 * y_BD, moment(model, dead_ids(40), mean_sq_residual=torch.tensor(1.0)))
    assert float(step.terms["aux_k"]) == pytest.approx(0.0, abs=1e-9)


def test_10_fvu_in_training_is_about_the_mean_and_errors_are_in_raw_units() -> None:
    model = make("relu-l1", "autoencoder")
    x_BD = 30.0 * (torch.randn(B, model.d_in, generator=torch.Generator().manual_seed(0)) + 5.0)
    trainee = trainee_of(model, x_BD)
    with torch.no_grad():
        model.b_enc.fill_(-1e6)  # an empty dictionary explains nothing but the mean
        for part in x_BD.split(30):
            trainee(part, 100)
    assert trainee.measurement().fvu == pytest.approx(1.0, rel=1e-5)
    validation = Validation(trainee, rows_per_pass=1000)
    for part in x_BD.split(40):
        validation.update(part)
    row = validation.finish(100)
    assert row["val/fvu"] == pytest.approx(1.0, rel=1e-5)
    assert row["val/mse"] == pytest.approx(float((x_BD - x_BD.mean(0)).square().mean()), rel=1e-5)
    assert row["val/loss"] == pytest.approx(trainee.measurement().terms["recon"], rel=1e-5)


@pytest.mark.parametrize("batch", [50, 100, 250])
def test_11_dead_is_counted_in_samples_not_in_batches(batch: int) -> None:
    """The same rows in batches of another size, and in micro-batches, give the same dead at the same clock."""
    model = make("topk", "autoencoder")
    x_ND = torch.randn(3000, model.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.b_enc.sub_(0.3 * torch.arange(len(model.b_enc)).float() / 10)  # the later a latent, the rarer it fires
        fired_NF = model.encode(x_ND * trainee_of(model, x_ND).scale_in) > 0
    trainee = trainee_of(model, x_ND, total_samples=10_000, batch=batch)  # a window of 1000 samples
    for start in range(0, 3000, batch):
        with torch.no_grad():
            for part in x_ND[start : start + batch].chunk(2):
                trainee(part, start + batch)
        trainee.reduce()
        trainee.advance(start + batch)
    numbers = torch.arange(1, 3001)[:, None]
    last_F = (fired_NF * (-(-numbers // batch) * batch)).amax(dim=0)
    expected = 3000 - last_F > 1000
    assert 5 < int(expected.sum()) < 90
    assert torch.equal(trainee.dead.dead_mask(), expected)


def test_14_small_updates_of_thresholds_are_kept_under_bf16() -> None:
    """In bf16 a logarithm of -1.6 moves in steps of 0.008, and updates of 7e-5 round away."""
    moved = []
    for enabled in (False, True):
        model = make("jumprelu-step", "autoencoder")
        assert isinstance(model, JumpReLU)
        x_BD, y_BD = rows(model)
        start_F = model.log_threshold.detach().clone()
        optimizer = torch.optim.Adam([model.log_threshold], lr=7e-5, betas=(0.0, 0.999))
        for _ in range(50):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(x_BD, y_BD, moment(model)).loss
            loss.backward()
            optimizer.step()
        assert model.log_threshold.dtype == torch.float32
        moved.append((model.log_threshold.detach() - start_F).abs().mean())
    assert float(moved[0]) > 1e-3
    assert float(moved[1]) == pytest.approx(float(moved[0]), rel=0.05)
