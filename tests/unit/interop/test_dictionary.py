"""Saved dictionaries: exact for raw inputs, loadable without Lightning or Hydra, and no damaged file loads."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shapes import ARCHITECTURES, BLOCKS, F, assert_same, make, rows
from torch import Tensor

import sparsepilot
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.errors import CheckpointError
from sparsepilot.interop import dictionary
from sparsepilot.interop.fold import fold
from sparsepilot.run_folder import write_json


def scales_of(widths: tuple[int, ...], first: float) -> Tensor:
    """[D]: one number per site, far from each other."""
    return torch.cat([torch.full((width,), first * 7.0**i) for i, width in enumerate(widths)])


def save(folder: Path, model: Autoencoder, strength: float, **more: int) -> tuple[Tensor, Tensor]:
    """Saves as the end of a run does; returns the scales of inputs and targets."""
    scale_in_D = scales_of(model.blocks.read_widths, 0.037)
    scale_out_D = scale_in_D if model.blocks.same else scales_of(model.blocks.write_widths, 0.4)
    cfg = {**model.inference_config(strength), "sites": ["a"], "sites_out": ["b"], **more}
    dictionary.save(folder, cfg, fold(cfg, model.inference_tensors(), scale_in_D, scale_out_D))
    return scale_in_D, scale_out_D


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_raw_inputs_give_what_training_had_scaled(tmp_path: Path, architecture: str, blocks: str) -> None:
    model = make(architecture, blocks)
    if architecture == "batchtopk":
        model.threshold.fill_(0.9)  # type: ignore[operator]
    scale_in_D, scale_out_D = save(tmp_path, model, model.knob.initial)
    loaded = sparsepilot.load(tmp_path)
    x_BD, y_BD = rows(model)
    step = model.evaluate(x_BD, y_BD, model.knob.initial)
    with torch.no_grad():
        raw_BD = x_BD / scale_in_D
        codes_BF = loaded.encode(raw_BD)
        y_hat_BD = loaded(raw_BD)
        assert_same(y_hat_BD, step.y_hat_BD / scale_out_D, "reconstruction", 1e-4)
        assert torch.equal((codes_BF > 0).sum(0), step.firings_F)
        # a raw code is a scaled one times the norm that its decoder row gave up
        norms_F = (model.W_dec / scale_out_D).norm(dim=1) * model.inference_tensors().get(
            "codes_factor", torch.ones(())
        )
        if architecture.startswith("topk"):
            norms_F = norms_F.mean().expand(F)
        else:
            torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(F))
        assert_same(codes_BF, model.encode(x_BD) * norms_F, "codes", 1e-4)
        if model.W_skip is None:
            assert_same(loaded.decode(codes_BF), y_hat_BD, "decode")
        if blocks == "autoencoder":
            torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(F))
        batch = raw_BD.view(2, -1, model.d_in)
        assert_same(loaded(batch).view_as(y_hat_BD), y_hat_BD, "more dimensions")


def test_a_file_of_format_1_still_loads(tmp_path: Path) -> None:
    make_ = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*shape, generator=make_)
        for name, shape in {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}.items()
    }
    save_file(tensors, tmp_path / "sae.safetensors")
    cfg = {"format": 1, "architecture": "topk", "d_in": 6, "d_sae": 20, "k": 3, "sites": ["a"]}
    (tmp_path / "sae.json").write_text(json.dumps(cfg))
    loaded = sparsepilot.load(tmp_path)
    x_BD = torch.randn(9, 6, generator=make_)
    pre_BF = (x_BD - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    codes_BF = pre_BF.relu() * (pre_BF >= pre_BF.topk(3).values[:, -1:])
    torch.testing.assert_close(loaded(x_BD).detach(), codes_BF @ tensors["W_dec"] + tensors["b_dec"])
    assert loaded.cfg["sites_out"] == ["a"]


@pytest.fixture
def saved(tmp_path: Path) -> Autoencoder:
    model = make("topk", "autoencoder")
    save(tmp_path, model, 4)
    return model


def test_loading_needs_neither_lightning_nor_hydra(saved: Autoencoder, tmp_path: Path) -> None:
    code = (
        "import sys, sparsepilot; sparsepilot.load(sys.argv[1]); "
        "bad = {'lightning', 'hydra', 'zarr', 'wandb', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_what_is_damaged_is_refused(saved: Autoencoder, tmp_path: Path) -> None:
    tensors, config = tmp_path / "sae.safetensors", tmp_path / "sae.json"
    good_tensors, good_config = tensors.read_bytes(), config.read_text()
    tensors.write_bytes(good_tensors[: len(good_tensors) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        sparsepilot.load(tmp_path)
    tensors.write_bytes(good_tensors)
    for change, message in [
        ({"d_sae": 21}, r"W_enc has shape \[12, 96\], sae.json says \[12, 21\]"),
        ({"skip": True}, r"W_skip has shape None, sae.json says \[12, 12\]"),
        ({"architecture": "jumprelu"}, r"threshold has shape None, sae.json says \[96\]"),
        ({"format": 99}, "format 99 is not known"),
        ({"architecture": "gatd"}, "architecture 'gatd' is not known"),
    ]:
        config.write_text(json.dumps({**json.loads(good_config), **change}))
        with pytest.raises(CheckpointError, match=message):
            sparsepilot.load(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"holds no sae.json"):
        sparsepilot.load(tmp_path)


def test_tensors_beside_the_json_of_an_earlier_end_are_refused(tmp_path: Path) -> None:
    """A finished run is extended, and killed between the two files."""
    model = make("topk", "autoencoder")
    save(tmp_path, model, 4, samples=100)
    before = (tmp_path / "sae.json").read_text()
    save(tmp_path, model, 4, samples=200)
    assert sparsepilot.load(tmp_path).cfg["samples"] == 200
    (tmp_path / "sae.json").write_text(before)
    with pytest.raises(CheckpointError, match="sae.safetensors is of 200 samples and sae.json of 100, as after a kill"):
        sparsepilot.load(tmp_path)


def test_a_disk_that_fills_at_the_end_is_one_line_that_names_the_file(saved: Autoencoder, tmp_path: Path) -> None:
    """The file-size limit of the process stands for the disk."""
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"^cannot write \S+/sae.safetensors: the disk is full"):
            save(tmp_path, saved, 4)
        with pytest.raises(CheckpointError, match=r"^cannot write \S+/sae.json: the disk is full"):
            write_json(tmp_path / "sae.json", list(range(1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
