"""What every architecture must bear, on both paths: empty rows, dead dictionaries, one row, every latent active, bf16,
inputs of a huge norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from shapes import ARCHITECTURES, BLOCKS, B, F, assert_same, dead_ids, make, moment, pre_of, rows
from torch import Tensor

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.batchtopk import BatchTopK
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.prefixes import FixedPrefixes
from sparsepilot.autoencoders.revival import AuxK, PreActivation
from sparsepilot.autoencoders.step import Step
from sparsepilot.autoencoders.topk import TopK
from sparsepilot.errors import ConfigError
from sparsepilot.ops.product import EncoderProduct, Workspace
from sparsepilot.ops.select import density_above
from sparsepilot.optimizers.muon import MuonWithAdam

PATHS: dict[str, dict[str, Any]] = {
    "sparse": {"dense_above": 1.0, "half_product": False},
    "sparse, found by half precision": {"dense_above": 1.0, "half_product": True},
    "dense": {"dense_above": 0.0},
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
paths = pytest.mark.parametrize("path", PATHS)


def run(model: Autoencoder, x_BD: Tensor, y_BD: Tensor, dead: Tensor | None = None, **changes: object) -> Step:
    """A step whose loss, terms and gradients are finite and whose firings are those of its reconstruction's codes."""
    model.zero_grad()
    step: Step = model(x_BD, y_BD, moment(model, dead, **changes))
    step.loss.backward()
    assert math.isfinite(float(step.loss.detach()))
    for name, value in step.terms.items():
        assert math.isfinite(float(value)), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name
    recon = (y_BD - step.y_hat_BD).square().sum(1).mean()
    assert float(step.terms["recon"]) == pytest.approx(float(recon), rel=1e-4)
    assert int(step.firings_F.min()) >= 0
    assert int(step.firings_F.max()) <= len(x_BD)
    return step


@paths
@architectures
def test_what_is_not_a_number_reaches_the_loss(architecture: str, path: str) -> None:
    """Where it vanished (no comparison with it is true), a broken parameter would train on as a latent that is off."""
    for where in ("row", "W_enc"):
        model = make(architecture, "transcoder", **PATHS[path])
        x_BD, y_BD = rows(model)
        with torch.no_grad():
            (x_BD if where == "row" else model.W_enc)[5] = math.nan
        step = model(x_BD, y_BD, moment(model))
        assert math.isnan(float(step.loss.detach())), where


@paths
@architectures
def test_nothing_active(architecture: str, path: str) -> None:
    """First on one row, then on all: y_hat is b_dec there, and the dead are still reached."""
    options = {**PATHS[path], "prefixes": FixedPrefixes([0.5])}
    model = make(architecture, "autoencoder", **options)
    x_BD, _ = rows(model)
    x_BD[7] = model.b_dec.detach()  # its pre-activations are b_enc
    with torch.no_grad():
        model.b_enc.fill_(-1.0)
    step = run(model, x_BD, x_BD)
    assert_same(step.y_hat_BD[7], model.b_dec.detach(), "the empty row")
    assert int(step.firings_F.sum()) > 0

    for revival in (AuxK(3), PreActivation(0.1)):
        model = make(architecture, "autoencoder", revival=revival, **options)
        with torch.no_grad():
            model.b_enc.fill_(-100.0)
            model.b_enc[5] = -1.0 if isinstance(revival, PreActivation) else -100.0
        step = run(model, x_BD, x_BD, torch.arange(F), mean_sq_residual=torch.tensor(5.0))
        if isinstance(revival, AuxK):
            assert int(step.firings_F.sum()) == 0
            assert_same(step.y_hat_BD, model.b_dec.detach().expand(B, -1), "y_hat")
            assert float(step.terms["recon"]) == pytest.approx(
                float((x_BD - model.b_dec.detach()).square().sum(1).mean())
            )
        else:
            assert model.W_enc.grad is not None
            assert bool(model.W_enc.grad.any(dim=1).all())  # all are lifted


@paths
@pytest.mark.parametrize("blocks", ["autoencoder", "transcoder-skip", "cross-layer"])
@architectures
def test_one_row(architecture: str, blocks: str, path: str) -> None:
    model = make(architecture, blocks, **PATHS[path], revival=AuxK(3), prefixes=FixedPrefixes([0.3]))
    x_BD, y_BD = rows(model, num_rows=1)
    strength = float(int(model.knob.initial)) if model.knob.kind == "k" else model.knob.initial
    one = run(model, x_BD, y_BD, dead_ids(20), strength=strength)
    many = run(model, x_BD.expand(5, -1), y_BD.expand(5, -1), dead_ids(20), strength=strength)
    assert_same(one.loss.detach(), many.loss.detach(), "loss")


@paths
@pytest.mark.parametrize("scale", [1e4, 0.0])
@architectures
def test_inputs_of_a_huge_norm_and_of_none(architecture: str, scale: float, path: str) -> None:
    model = make(architecture, "autoencoder", **PATHS[path], revival=AuxK(3))
    x_BD, _ = rows(model)
    run(model, scale * x_BD, scale * x_BD, dead_ids(20))
    x_BD[3] *= 1e4  # one token of a huge norm, as at the start of a text
    run(model, x_BD, x_BD, dead_ids(20))


@pytest.mark.parametrize("tile_latents", [None, 36])
@pytest.mark.parametrize("path", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("architecture", ["topk", "topk-multi", "batchtopk"])
def test_every_latent_chosen(architecture: str, path: float, tile_latents: int | None) -> None:
    model = make(architecture, "autoencoder", dense_above=path, tile_latents=tile_latents, revival=AuxK(3))
    x_BD, _ = rows(model)
    step = run(model, x_BD, x_BD, dead_ids(20), strength=float(F))
    with torch.no_grad():
        pre_BF = (x_BD - model.b_dec) @ model.W_enc.T + model.b_enc
    assert torch.equal(step.firings_F, (pre_BF > 0).sum(0))
    assert_same(step.y_hat_BD, (pre_BF.relu() @ model.W_dec + model.b_dec).detach(), "y_hat")


@pytest.mark.parametrize("blocks", ["autoencoder", "cross-layer"])
@architectures
def test_bf16_autocast(architecture: str, blocks: str) -> None:
    """The sparse path chooses in bf16 and computes in fp32: hardly another step than without; the dense one is near."""
    options = {"revival": AuxK(3), "prefixes": FixedPrefixes([0.3])}
    for path, tolerance in ((1.0, 1e-3), (0.0, 3e-2)):
        model = make(architecture, blocks, dense_above=path, **options)
        x_BD, y_BD = rows(model, num_rows=200)  # BatchTopK takes a sample of them
        exact = run(model, x_BD, y_BD, dead_ids(40))
        with torch.autocast("cpu", torch.bfloat16):
            rough = run(model, x_BD, y_BD, dead_ids(40))
        assert rough.y_hat_BD.dtype == torch.float32
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        recon = float(exact.terms["recon"])
        assert float(rough.terms["recon"]) == pytest.approx(recon, rel=tolerance)
        assert float(rough.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=max(tolerance, 1e-2))
        if path == 1.0:
            assert int((rough.firings_F - exact.firings_F).abs().sum()) <= 0.002 * int(exact.firings_F.sum())


@paths
@architectures
def test_forward_twice_changes_nothing(architecture: str, path: str) -> None:
    """Field notes, mistake 4: a second look at the loss advanced counters and averages. Only `close_step` may."""
    model = make(architecture, "autoencoder", **PATHS[path], revival=AuxK(3))
    x_BD, y_BD = rows(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model(x_BD, y_BD, moment(model, dead_ids(20)))
    model.evaluate(x_BD, y_BD, model.knob.initial)
    second = model(x_BD, y_BD, moment(model, dead_ids(20)))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.y_hat_BD, second.y_hat_BD)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@architectures
@pytest.mark.parametrize("blocks", BLOCKS)
def test_unit_rows_stay_with_an_orthogonal_gradient_and_free_rows_are_left_alone(
    architecture: str, blocks: str
) -> None:
    model = make(architecture, blocks)
    run(model, *rows(model))
    assert model.W_dec.grad is not None
    gradient = model.W_dec.grad.clone()
    model.project_gradients()
    with torch.no_grad():
        model.W_dec.add_(0.3 * model.W_dec)
    longer = model.W_dec.detach().clone()
    model.after_step()
    if model.unit_decoder:
        assert float((model.W_dec.grad * model.W_dec.detach()).sum(1).abs().max()) < 1e-4
        torch.testing.assert_close(model.W_dec.detach().norm(dim=1), torch.ones(F))
    else:
        mask = model._decoder_mask
        assert torch.equal(model.W_dec.grad, gradient if mask is None else gradient * mask)
        assert torch.equal(model.W_dec.detach(), longer)


def test_a_cross_layer_decoder_keeps_its_zeros_under_muon() -> None:
    """Muon's update is dense whatever the gradient's zeros: layers must not learn to write backwards."""
    model = make("relu-l1", "cross-layer")
    optimizer = MuonWithAdam(model.parameters(), lr=0.1)
    run(model, *rows(model))
    model.project_gradients()
    optimizer.step()
    model.after_step()
    assert model._decoder_mask is not None
    assert not model.W_dec[~model._decoder_mask.bool()].any()  # type: ignore[operator]


def test_latents_must_share_out_over_the_layers() -> None:
    with pytest.raises(ConfigError, match=r"model\.d_sae = 64: must be a multiple of 3"):
        TopK(BLOCKS["cross-layer"], 64, 4)


@paths
def test_batchtopk_before_its_first_step_has_codes_above_zero_only(path: str) -> None:
    model = make("batchtopk", "autoencoder", **PATHS[path])
    assert isinstance(model, BatchTopK)
    x_BD, y_BD = rows(model)
    assert float(model.encode(x_BD).detach().min()) == 0
    assert int(model.evaluate(x_BD, y_BD, 4.5).firings_F.sum()) == round(4.5 * B)


def test_blocks_of_one_site_are_an_autoencoder() -> None:
    assert Blocks.autoencoder(4).kind == "autoencoder"
    assert [blocks.kind for blocks in BLOCKS.values()] == [
        "autoencoder", "crosscoder", "transcoder", "transcoder", "cross_layer_transcoder",
    ]  # fmt: skip


def test_a_cross_layer_latent_has_the_norm_of_all_that_it_writes() -> None:
    """The sum over layers would press hardest on the latents of the first ones, which write most."""
    model = make("jumprelu-tanh", "cross-layer")
    W_dec_FD = model.W_dec.detach()
    assert_same(model.decoder_norms().detach(), W_dec_FD.square().sum(dim=1).sqrt(), "of a cross-layer transcoder")
    model = make("jumprelu-tanh", "crosscoder")
    first, second = model.W_dec.detach().split([5, 8], dim=1)
    assert_same(model.decoder_norms().detach(), first.norm(dim=1) + second.norm(dim=1), "of a crosscoder")


def test_density_is_judged_all_over_the_batch() -> None:
    """A batch is put together from places of the data, each a run of rows: the first ones may be quiet ones."""
    model = make("relu-l1", "autoencoder")
    x_BD, _ = rows(model, num_rows=1024)
    x_BD[:64] = model.b_in.detach()  # all off
    with torch.no_grad():
        model.b_enc.fill_(-0.01)
    product = EncoderProduct(x_BD - model.b_in.detach(), model.W_enc.detach(), model.b_enc.detach(), Workspace())
    share = float((pre_of(model, x_BD).detach() > 0).float().mean())
    assert share > 0.4
    assert density_above(product, 0.0) == pytest.approx(share, abs=0.1)
