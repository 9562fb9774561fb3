"""Saved dictionaries: exact for raw inputs, loadable without Lightning or Hydra, and no damaged file loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsepilot
from sparsepilot.autoencoders.topk import TopK
from sparsepilot.errors import CheckpointError
from sparsepilot.interop import dictionary

SCALE = 0.37


@pytest.fixture
def saved(tmp_path: Path) -> TopK:
    torch.manual_seed(0)
    model = TopK(d_in=6, d_sae=20, k=3)
    with torch.no_grad():
        model.b_enc.normal_()
        model.b_dec.normal_()
    dictionary.save(tmp_path, model.inference_config(strength=3), model.inference_tensors(), SCALE)
    return model


def test_raw_inputs_give_the_scaled_reconstruction(saved: TopK, tmp_path: Path) -> None:
    x_BD = 10 * torch.randn(50, 6)
    loaded = sparsepilot.load(tmp_path)
    codes_BF = saved.encode(x_BD * SCALE)
    torch.testing.assert_close(loaded.encode(x_BD) * SCALE, codes_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(x_BD) * SCALE, saved.decode(codes_BF), rtol=1e-5, atol=1e-5)


def test_loading_needs_neither_lightning_nor_hydra(saved: TopK, tmp_path: Path) -> None:
    code = (
        "import sys, sparsepilot; sparsepilot.load(sys.argv[1]); "
        "bad = {'lightning', 'hydra', 'zarr', 'wandb', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_what_is_damaged_is_refused(saved: TopK, tmp_path: Path) -> None:
    tensors, config = tmp_path / "sae.safetensors", tmp_path / "sae.json"
    good_tensors, good_config = tensors.read_bytes(), config.read_text()
    tensors.write_bytes(good_tensors[: len(good_tensors) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        sparsepilot.load(tmp_path)
    tensors.write_bytes(good_tensors)
    for change, message in [
        ({"d_sae": 21}, r"W_enc has shape \[6, 20\], sae.json says \[6, 21\]"),
        ({"format": 99}, "format 99 is not known"),
        ({"architecture": "gatd"}, "architecture 'gatd' is not known"),
    ]:
        config.write_text(json.dumps({**json.loads(good_config), **change}))
        with pytest.raises(CheckpointError, match=message):
            sparsepilot.load(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"holds no sae.json"):
        sparsepilot.load(tmp_path)
