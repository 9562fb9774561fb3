"""A run that begins from a dictionary reconstructs in step 0 what that dictionary did."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shapes import ARCHITECTURES, BLOCKS, assert_same, make, rows
from torch import Tensor

import sparsepilot
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.errors import ConfigError
from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.fold import fold
from sparsepilot.starting import Origin, begin_from


def scales_of(widths: tuple[int, ...], first: float) -> Tensor:
    """[D]: one number per site, far from each other."""
    return torch.cat([torch.full((width,), first * 7.0**i) for i, width in enumerate(widths)])


def scales(model: Autoencoder, first: float) -> tuple[Tensor, Tensor]:
    scale_in_D = scales_of(model.blocks.read_widths, first)
    return scale_in_D, scale_in_D if model.blocks.same else scales_of(model.blocks.write_widths, 10 * first)


def saved(model: Autoencoder, first: float) -> Dictionary:
    """What the end of a run leaves of `model`."""
    scale_in_D, scale_out_D = scales(model, first)
    cfg = model.inference_config(model.knob.initial)
    return build(cfg, fold(cfg, model.inference_tensors(), scale_in_D, scale_out_D), Path("sae.json"))


def trainee(model: Autoencoder, first: float) -> Any:
    """A trainee as far as beginning is concerned."""
    scale_in_D, scale_out_D = scales(model, first)
    controller = SimpleNamespace(strength=model.knob.initial)
    return SimpleNamespace(autoencoder=model, scale_in=scale_in_D, scale_out=scale_out_D, controller=controller)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_0_reconstructs_as_the_dictionary_did(architecture: str, blocks: str) -> None:
    """Trained on data of one scale and mean, begun from on data of another."""
    old, new = make(architecture, blocks), make(architecture, blocks, seed=5)
    if architecture == "batchtopk":
        old.threshold.fill_(0.9)  # type: ignore[operator]
    origin, run = saved(old, 0.037), trainee(new, 0.011)
    assert begin_from(Origin("somewhere", origin), run) == []
    new.after_step()  # rows are of norm 1 where the architecture keeps them so: nothing moves
    x_BD, y_BD = rows(new)
    step = new.evaluate(x_BD, y_BD, new.knob.initial)
    with torch.no_grad():
        raw_BD = x_BD / run.scale_in
        assert_same(step.y_hat_BD, origin(raw_BD) * run.scale_out, "reconstruction", 1e-5)
        assert torch.equal(step.firings_F, (origin.encode(raw_BD) > 0).sum(0))


@pytest.mark.parametrize(("was", "is_now", "exact"), [
    ("batchtopk", "jumprelu-step", True), ("jumprelu-step", "topk", False), ("topk", "relu-l1", False),
])  # fmt: skip
def test_another_architecture_takes_the_weights(was: str, is_now: str, exact: bool) -> None:
    old, new = make(was, "autoencoder"), make(is_now, "autoencoder", seed=5)
    if was == "batchtopk":
        old.threshold.fill_(0.9)  # type: ignore[operator]
    origin, run = saved(old, 0.037), trainee(new, 0.011)
    notes = begin_from(Origin("somewhere", origin), run)
    assert_same(torch.nn.functional.normalize(new.W_dec, dim=1).detach(), origin.W_dec.detach(), "decoder")
    x_BD, y_BD = rows(new)
    same = torch.allclose(
        new.evaluate(x_BD, y_BD, new.knob.initial).y_hat_BD / run.scale_out, origin(x_BD / run.scale_in), rtol=1e-3
    )
    assert (same, notes == []) == (exact, exact)


def test_topk_of_uneven_decoder_rows_says_that_others_may_be_active() -> None:
    origin = saved(make("topk", "autoencoder"), 0.037)
    with torch.no_grad():
        origin.W_dec[3] *= 1.5
    (note,) = begin_from(Origin("somewhere", origin), trainee(make("topk", "autoencoder"), 0.037))
    assert "norms" in note


@pytest.mark.parametrize(("change", "message"), [
    ({"d_sae": 48}, r"^model\.init_from = there: d_sae is 96 there and 48 here; set model\.d_sae to it"),
    ({"blocks": "transcoder"}, r"blocks is 'autoencoder' there and 'transcoder' here"),
    ({"d_in": 13}, r"d_in is 12 there and 13 here"),
    ({"architecture": "gated"}, r"is topk, the run gated"),
])  # fmt: skip
def test_what_cannot_be_begun_from_is_one_line(change: dict[str, Any], message: str) -> None:
    origin, model = saved(make("topk", "autoencoder"), 1.0), make("topk", "autoencoder")
    config = model.inference_config(4)
    model.inference_config = lambda strength: {**config, **change}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=message):
        begin_from(Origin("there", origin), trainee(model, 1.0))


def test_a_skip_that_the_run_has_not_is_refused_and_one_more_is_fine() -> None:
    origin = saved(make("topk", "transcoder-skip"), 1.0)
    bare = make("topk", Blocks((6,), (9, 4), same=False))
    with pytest.raises(ConfigError, match=r"skip is True there and False here; set model\.skip=true"):
        begin_from(Origin("there", origin), trainee(bare, 1.0))
    run = trainee(make("topk", "transcoder-skip", seed=5), 1.0)
    torch.nn.init.zeros_(run.autoencoder.W_skip)
    begin_from(Origin("there", saved(bare, 1.0)), run)
    assert not run.autoencoder.W_skip.any()


def test_a_run_begins_where_another_ended(train_tiny: Any, compose_cfg: Any, tmp_path: Path) -> None:
    train_tiny()
    first = sparsepilot.load(tmp_path / "run")
    origin = tmp_path / "origin"
    (tmp_path / "run").rename(origin)
    # a learning rate of nothing: the first row of metrics is of the weights that the run began with, as is the last
    words = (f"model.init_from={origin}", "optimizer.lr=1e-30", "samples=512", f"run_dir={tmp_path}/second")
    train_tiny(*words)
    second = sparsepilot.load(tmp_path / "second")
    x_BD = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    assert_same(second(x_BD).detach(), first(x_BD).detach(), "reconstruction")
    origin.rename(tmp_path / "moved")
    train_tiny(*words, "samples=1024")  # it goes on with its own weights
    with pytest.raises(ConfigError, match=r"^model\.init_from = .*origin: .*there is no such file or folder"):
        train_tiny(*words, f"run_dir={tmp_path}/third")
    assert not (tmp_path / "third").exists()
    with pytest.raises(ConfigError, match=r"model\.init_from = 3: "):
        train_tiny("model.init_from=3", f"run_dir={tmp_path}/third")
