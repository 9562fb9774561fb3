"""The sparse path and its dense twin give one answer: every architecture, on all blocks, with prefixes and revivals."""

from __future__ import annotations

import pytest
import torch
from shapes import ARCHITECTURES, BLOCKS, F, assert_same, dead_ids, gradients, make, moment, rows

from sparsepilot.autoencoders import base
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.prefixes import FixedPrefixes, Prefixes, RandomPrefixes
from sparsepilot.autoencoders.revival import AuxK, PreActivation, Revival
from sparsepilot.autoencoders.step import Step
from sparsepilot.ops import product

PREFIXES: dict[str, Prefixes | None] = {
    "whole": None, "fixed": FixedPrefixes([0.1, 0.4]), "random": RandomPrefixes(4),
}  # fmt: skip
REVIVALS: dict[str, tuple[Revival | None, int]] = {
    "none": (None, 0),
    "aux_k few": (AuxK(3, 0.5), 40),
    "aux_k all": (AuxK(None, 0.5), 5),
    "aux_k nobody": (AuxK(None, 0.5), 0),
    "pre_activation": (PreActivation(0.02), 9),
}


def both_paths(architecture: str, blocks: str, monkeypatch, dead: int = 0, **common) -> list[tuple[Autoencoder, Step]]:
    """(model, step) of the sparse and of the dense path, each having run the path that is meant."""
    found = []
    for share in (1.0, 0.0):
        model = make(architecture, blocks, dense_above=share, **common)
        ran: list[bool] = []
        original = type(model).dense_tile
        monkeypatch.setattr(model, "dense_tile", lambda *a, m=model, o=original, r=ran: (r.append(True), o(m, *a))[1])
        step = model(*rows(model), moment(model, dead_ids(dead), seed=3))
        assert bool(ran) == (share == 0.0)
        found.append((model, step))
    return found


def assert_equal_steps(found: list[tuple[Autoencoder, Step]]) -> None:
    (sparse_model, mine), (dense_model, theirs) = found
    # an entry at the very edge of a choice may fall on another side in another order of adding: none does here
    assert torch.equal(mine.firings_F, theirs.firings_F)
    assert mine.firings_F.dtype == torch.int64
    assert 0 < int(mine.firings_F.sum()) < F * len(theirs.y_hat_BD)
    assert mine.terms.keys() == theirs.terms.keys() <= set(sparse_model.term_names)
    assert_same(mine.loss.detach(), theirs.loss.detach(), "loss")
    assert_same(mine.y_hat_BD, theirs.y_hat_BD, "y_hat")
    for name, value in theirs.terms.items():
        assert not value.requires_grad
        assert_same(mine.terms[name], value, name)
    theirs_by_name = gradients(dense_model, theirs.loss)
    for name, gradient in gradients(sparse_model, mine.loss).items():
        assert torch.isfinite(gradient).all()
        assert_same(gradient, theirs_by_name[name], f"gradient of {name}", 2e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_shape(monkeypatch, architecture: str, blocks: str, prefixes: str, half: bool) -> None:
    """Whether active latents are found by half-precision products or not, which depends on the hardware."""
    assert_equal_steps(both_paths(architecture, blocks, monkeypatch, prefixes=PREFIXES[prefixes], half_product=half))


@pytest.mark.parametrize("revival", REVIVALS)
@pytest.mark.parametrize("blocks", ["autoencoder", "transcoder-skip", "cross-layer"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu-tanh", "jumprelu-tanh", "gated"])
def test_every_revival(monkeypatch, architecture: str, blocks: str, revival: str) -> None:
    how, num_dead = REVIVALS[revival]
    steps = both_paths(architecture, blocks, monkeypatch, num_dead, revival=how)
    assert_equal_steps(steps)
    for _, step in steps:
        if how is not None:
            assert (how.term_name in step.terms) == (num_dead > 0)


@pytest.mark.parametrize("tile_latents", [None, 20])
@pytest.mark.parametrize("blocks", ["autoencoder", "cross-layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_change_nothing(monkeypatch, architecture: str, blocks: str, tile_latents: int | None) -> None:
    """Tiles of rows and of latents (20 divides neither 96 nor 32), on both paths."""
    how = PreActivation(0.02) if architecture == "jumprelu-tanh" else AuxK(3, 0.5)
    options = {"revival": how, "prefixes": FixedPrefixes([0.3]), "tile_latents": tile_latents}
    whole = both_paths(architecture, blocks, monkeypatch, 30, **options)
    monkeypatch.setitem(product.TILE_BYTES, "cpu", 1)  # 64 rows, so two tiles
    tiled = both_paths(architecture, blocks, monkeypatch, 30, **options)
    for pair in zip(whole, tiled, strict=True):
        assert_equal_steps(list(pair))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_equals_the_plain_forms(architecture: str, blocks: str) -> None:
    """`evaluate` on both paths, `encode` and `decode`: the same codes, and no state has moved."""
    for share in (1.0, 0.0):
        model = make(architecture, blocks, dense_above=share, prefixes=FixedPrefixes([0.5]))
        if architecture == "batchtopk":
            model.threshold.fill_(0.9)  # type: ignore[operator]
        x_BD, y_BD = rows(model)
        step = model.evaluate(x_BD, y_BD, model.knob.initial)
        with torch.no_grad():
            codes_BF = model.encode(x_BD)
            y_hat_BD = model.decode(codes_BF)
            if model.W_skip is not None:
                y_hat_BD = y_hat_BD + (x_BD - model.b_in) @ model.W_skip.T
        assert torch.equal(step.firings_F, (codes_BF > 0).sum(0))
        assert_same(step.y_hat_BD, y_hat_BD, "y_hat")
        assert_same(step.terms["recon"], (y_BD - y_hat_BD).square().sum(1).mean(), "recon")
        assert not step.loss.requires_grad


def test_cross_layer_latents_read_one_site_and_write_it_and_those_after() -> None:
    model = make("relu-l1", "cross-layer")
    x_BD, y_BD = rows(model)
    x_BD.requires_grad_()
    codes_BF = model.encode(x_BD)
    for layer in range(3):
        part = slice(32 * layer, 32 * (layer + 1))
        (reached,) = torch.autograd.grad(codes_BF[:, part].sum(), x_BD, retain_graph=True)
        assert reached.any(dim=0).tolist() == [i // 6 == layer for i in range(18)]
        written = model.decode(torch.nn.functional.pad(codes_BF.detach()[:, part], (32 * layer, 64 - 32 * layer)))
        sites = (written - model.b_dec).detach().split((5, 5, 7), dim=1)
        assert [bool(site.any()) for site in sites] == [to >= layer for to in range(3)]
    model(x_BD, y_BD, moment(model)).loss.backward()
    model.project_gradients()
    assert model.W_dec.grad is not None
    assert not model.W_dec.grad[64:, :10].any()


@pytest.mark.parametrize("blocks", ["autoencoder", "cross-layer"])
def test_gradcheck_of_multi_topk_in_float64(blocks: str) -> None:
    """The choice stays what it is within gradcheck's steps, so the gradient is the true derivative."""
    model = make("topk-multi", blocks, dense_above=1.0).double()
    x_BD, y_BD = (side[:6].double() for side in rows(model))
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters: torch.Tensor) -> torch.Tensor:
        step: Step = torch.func.functional_call(
            model, dict(zip(names, parameters, strict=True)), (x_BD, y_BD, moment(model))
        )
        return step.loss

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("aux_k", [3, 60, 80])
def test_gradcheck_of_aux_k_in_float64(aux_k: int) -> None:
    """Of a given residual: the step detaches its own. Sparse (3), dense (60), all dead latents (80)."""
    how = AuxK(aux_k)
    model = make("topk", "transcoder", dense_above=0.1, revival=how).double()
    x_BD, y_BD = (side[:6].double() for side in rows(model))
    now = moment(model, dead_ids(80))
    names = ("W_enc", "b_enc", "W_dec")

    def term(*parameters: torch.Tensor) -> torch.Tensor:
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, parameters, strict=True))):
            return how.term(model, x_BD, y_BD, now, 80)

    assert torch.autograd.gradcheck(term, tuple(getattr(model, name) for name in names), fast_mode=True)


def test_below_the_density_no_dense_product_is_differentiated(monkeypatch) -> None:
    """Its cost must not come back unseen."""
    monkeypatch.setattr(base, "encode_plain", None)
    model = make("topk-multi", "crosscoder", dense_above=1.0, revival=AuxK(3))
    model(*rows(model), moment(model, dead_ids(30))).loss.backward()
