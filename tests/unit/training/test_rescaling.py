"""`model.rescale`: codes at inference times one factor. Both paths and shards: `relu-log` of tests/shapes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsepilot
from sparsepilot.autoencoders.rescaling import Rescaling
from sparsepilot.data.cache import Cache
from sparsepilot.rows import read_rows

PRESSED = ("model=relu", "model.coefficient=2", "samples=51200", "schedule=constant")


def best_factor(run: Path, cache: Cache) -> float:
    """The factor that brings the exported dictionary's reconstructions of all training rows closest."""
    (site,) = cache.widths
    sae = sparsepilot.load(run)
    x_BD = cache.read(site, 0, cache.num_train_rows).float()
    with torch.no_grad():
        d_BD = (sae.decode(sae.encode(x_BD)) - sae.b_dec).double()
        return float((d_BD * (x_BD - sae.b_dec)).sum() / (d_BD * d_BD).sum())


def weights(run: Path) -> dict[str, Any]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if not name.endswith("extra_state")}


def test_it_undoes_shrinkage_and_leaves_training_alone(train_tiny, tmp_path: Path) -> None:
    without = train_tiny(*PRESSED, f"run_dir={tmp_path}/without")
    rescaled = train_tiny(*PRESSED, "model.rescale=true", f"run_dir={tmp_path}/rescaled")
    cache = Cache(tmp_path / "cache")
    # the penalty has taken a good part, and the running means of the last steps know how much
    assert best_factor(tmp_path / "without", cache) > 1.1
    assert best_factor(tmp_path / "rescaled", cache) == pytest.approx(1, abs=0.02)
    assert rescaled["metrics"]["val/fvu"] < 0.97 * without["metrics"]["val/fvu"]
    assert rescaled["metrics"]["val/l0"] == without["metrics"]["val/l0"]
    theirs = weights(tmp_path / "rescaled")
    products_2 = theirs.pop("trainees.sae.autoencoder.rescaling.products_2")
    assert products_2[1] > products_2[0] > 0
    for name, tensor in weights(tmp_path / "without").items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(theirs[name])), name
    for a, b in zip(*(read_rows(tmp_path / run / "metrics.jsonl") for run in ("without", "rescaled")), strict=True):
        assert {k: v for k, v in b.items() if k in a and k.startswith("train/")} == {
            k: v for k, v in a.items() if k.startswith("train/")
        }
    # what is exported is what was validated, in unit rows
    sae = sparsepilot.load(tmp_path / "rescaled")
    (site,) = cache.widths
    x_BD = cache.read(site, cache.num_train_rows, cache.num_train_rows + cache.num_val_rows).float()
    with torch.no_grad():
        left = (x_BD - sae.decode(sae.encode(x_BD))).square().sum()
    total = (x_BD - cache.stats(site).mean_D).square().sum()
    assert float(left / total) == pytest.approx(rescaled["metrics"]["val/fvu"], rel=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)))


def test_a_run_that_goes_on_has_the_same_factor(train_tiny, tmp_path: Path) -> None:
    options = (*PRESSED, "model.rescale=true", "callbacks.validate_every_samples=10240")
    train_tiny(*options, f"run_dir={tmp_path}/whole", "samples=10240")
    train_tiny(*options, f"run_dir={tmp_path}/parts", "samples=5120")
    train_tiny(*options, f"run_dir={tmp_path}/parts", "samples=10240")
    name = "trainees.sae.autoencoder.rescaling.products_2"
    assert torch.equal(weights(tmp_path / "whole")[name], weights(tmp_path / "parts")[name])


def test_before_there_is_anything_to_go_by_the_factor_is_one() -> None:
    rescaling = Rescaling()
    names = Rescaling.measures
    assert float(rescaling.factor) == 1
    rescaling.update(dict(zip(names, (torch.tensor(0.0), torch.tensor(0.0)), strict=True)))  # nothing fired
    assert float(rescaling.factor) == 1
    rescaling.update(dict(zip(names, (torch.tensor(2.0), torch.tensor(-1.0)), strict=True)))
    assert float(rescaling.factor) == 1
    for _ in range(200):
        rescaling.update(dict(zip(names, (torch.tensor(2.0), torch.tensor(3.0)), strict=True)))
    assert float(rescaling.factor) == pytest.approx(1.5, rel=1e-3)
