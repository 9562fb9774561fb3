"""The training step as a whole: one clock, accumulation, what the controller sees, NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsepilot
from sparsepilot.data.order import Order
from sparsepilot.errors import CheckpointError, NonFiniteError
from sparsepilot.rows import read_rows


def rows_of(run: Path) -> list[dict[str, Any]]:
    return list(read_rows(run / "metrics.jsonl"))


def checkpoint_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_leaves_everything_that_is_promised(train_tiny, tmp_path: Path) -> None:
    summary = train_tiny("callbacks.validate_every_samples=2560", "report=true")
    run = tmp_path / "run"
    assert {"config.yaml", "run.json", "metrics.jsonl", "timing.jsonl", "summary.json", "sae.json", "sae.safetensors",
            "checkpoints", "report", ".lock"} == {p.name for p in run.iterdir()}  # fmt: skip
    for kind in ("png", "svg"):
        assert {"l0", "loss", "control", "dead_latents", "learning_rate"} <= {
            p.stem for p in (run / "report").glob(f"*.{kind}")
        }
    assert (run / "report" / "report.html").exists()
    rows = rows_of(run)
    train_rows = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in train_rows] == list(range(1, 21))
    assert [row["samples"] for row in rows if "val/fvu" in row] == [2560, 5120]
    for row in rows:
        assert row["samples"] == row["tokens"] == 256 * row["step"]
        assert all(type(row[key]) is int for key in ("step", "samples", "tokens"))
    expected = {"train/loss", "train/l0", "train/fvu", "train/dead_latents", "train/lr", "controller/strength"}
    assert expected <= set(train_rows[0])
    assert {"val/loss", "val/l0", "val/fvu", "val/silent_latents", "val/recovery"} <= set(rows[-1])
    assert train_rows[0]["controller/strength"] == 4
    assert summary["metrics"]["val/fvu"] == rows[-1]["val/fvu"]
    assert json.loads((run / "summary.json").read_text())["samples"] == 5120

    saved = sparsepilot.load(run)
    assert saved.cfg["architecture"] == "topk"
    assert saved.W_enc.shape == (16, 64)


def test_saved_dictionary_reconstructs_raw_rows_as_validation_said(train_tiny, tmp_path: Path) -> None:
    from sparsepilot.data.cache import Cache

    summary = train_tiny()
    cache = Cache(tmp_path / "cache")
    site = next(iter(cache.widths))
    start = cache.num_train_rows
    x_BD = cache.read(site, start, start + cache.num_val_rows).float()
    saved = sparsepilot.load(tmp_path / "run")
    with torch.no_grad():
        codes_BF = saved.encode(x_BD)
        x_hat_BD = saved.decode(codes_BF)
    mean_D = cache.stats(site).mean_D
    fvu = (x_BD - x_hat_BD).square().sum() / (x_BD - mean_D).square().sum()
    assert float(fvu) == pytest.approx(summary["metrics"]["val/fvu"], rel=1e-5)
    assert float((codes_BF > 0).sum(1).float().mean()) == pytest.approx(summary["metrics"]["val/l0"])
    assert float((x_BD - x_hat_BD).square().mean()) == pytest.approx(summary["metrics"]["val/mse"], rel=1e-5)
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(64))


def test_accumulation_equals_one_big_batch(train_tiny, tmp_path: Path) -> None:
    """AuxK included: a window of two steps makes latents dead soon, and its normaliser is that of the global batch."""
    options = ("model.d_sae=128", "model.k=2", "samples=25600", "seed=3", "callbacks.log_every_steps=1")
    train_tiny(f"run_dir={tmp_path}/whole", *options)
    train_tiny(f"run_dir={tmp_path}/parts", "accumulate=4", *options)
    whole, parts = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    assert max(row.get("train/dead_latents", 0) for row in whole) > 0
    assert any(row.get("train/loss_aux_k", 0) > 0 for row in whole)
    for a, b in zip(whole, parts, strict=True):
        assert a.keys() == b.keys()
        for key in ("train/loss", "train/fvu", "train/l0", "train/loss_aux_k", "val/fvu"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
        assert a.get("train/dead_latents") == b.get("train/dead_latents")


@pytest.mark.parametrize(
    "model",
    [
        ("model=jumprelu", "model.target_l0=6", "model.coefficient=10"),
        ("model=gated",),
        ("model=relu", "model.penalty=tanh"),
    ],
    ids=["jumprelu, target", "gated", "relu, tanh"],
)
def test_accumulation_changes_no_penalty(train_tiny, tmp_path: Path, model: tuple[str, ...]) -> None:
    options = (*model, "samples=12800", "callbacks.log_every_steps=1")
    train_tiny(f"run_dir={tmp_path}/whole", *options)
    train_tiny(f"run_dir={tmp_path}/parts", "accumulate=4", *options)
    for a, b in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"), strict=True):
        for key in ("train/loss", "train/fvu", "train/l0", "train/loss_sparsity", "val/fvu"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])


def test_the_controller_sees_the_step_before_once_per_optimizer_step(train_tiny, tmp_path, monkeypatch) -> None:
    from sparsepilot.controllers.base import Measured
    from sparsepilot.controllers.constant import Constant

    seen: list[tuple[float | None, int]] = []
    original = Constant.update

    def update(self: Constant, measured: Measured | None, samples: int) -> float:
        seen.append((measured and measured.l0, samples))
        return original(self, measured, samples)

    monkeypatch.setattr(Constant, "update", update)
    train_tiny("accumulate=2", "samples=2560")
    l0 = [row["train/l0"] for row in rows_of(tmp_path / "run") if "train/l0" in row]
    assert [samples for _, samples in seen] == [256 * (i + 1) for i in range(10)]
    assert [measured for measured, _ in seen] == [None, *l0[:-1]]


def test_dead_latents_follow_the_clock(train_tiny, tmp_path: Path) -> None:
    train_tiny("model.d_sae=512", "model.k=1", "model/revival=none", "samples=25600")
    state = checkpoint_of(tmp_path / "run")["state_dict"]
    last_fired_F, samples = state["trainees.sae.dead.last_fired_F"], state["trainees.sae.dead.samples"]
    assert last_fired_F.dtype == torch.int64
    window = 2560  # a tenth of the budget
    dead = int((samples - last_fired_F > window).sum())
    assert dead == rows_of(tmp_path / "run")[-2]["train/dead_latents"] > 0
    assert bool((last_fired_F % 256 == 0).all())


def test_resumed_twice_is_the_unbroken_run(train_tiny, tmp_path: Path) -> None:
    """The quick form, without a kill; tests/e2e/test_kill_resume.py has real ones."""
    # a longer budget is an allowed change; the learning rate is constant, but the window after which a latent is dead
    # grows with the budget: nothing may hang on it
    # and twenty validations in each run, which are at other places where it is cut: they leave training alone
    options = ("model=batchtopk", "model/revival=none", "callbacks.validate_every_samples=null")
    train_tiny(f"run_dir={tmp_path}/whole", "samples=7680", *options)
    for samples in (2560, 5120, 7680):
        train_tiny(f"run_dir={tmp_path}/cut", f"samples={samples}", *options)
    validated = [[row["step"] for row in rows_of(tmp_path / run) if "val/l0" in row] for run in ("whole", "cut")]
    assert validated[0] != validated[1]
    whole, cut = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "cut")
    assert whole["sparsepilot"] == cut["sparsepilot"]
    for name, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, cut["state_dict"][name]), name
    assert all(
        torch.equal(a["exp_avg"], b["exp_avg"])
        for a, b in zip(
            whole["optimizer_states"][0]["state"].values(), cut["optimizer_states"][0]["state"].values(), strict=True
        )
    )
    assert sorted(p.name for p in (tmp_path / "cut").glob("config*.yaml")) == [
        "config-1.yaml",
        "config-2.yaml",
        "config.yaml",
    ]


def test_resuming_with_other_threads_says_so(train_tiny) -> None:
    train_tiny()
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="same order of data but not the same bits: threads was 1, is 2"):
            train_tiny("samples=7680")
    finally:
        torch.set_num_threads(1)


def test_a_nan_row_stops_the_run_and_keeps_the_last_good_checkpoint(train_tiny, tmp_path, monkeypatch) -> None:
    from sparsepilot.data import loader

    original = loader.TrainLoader._micro_batches

    def poisoned(self: Any, windows: Any) -> Any:
        for number, batch in enumerate(original(self, windows)):
            if number == 12:
                batch.x_BD[37, 3] = np.nan
            yield batch

    monkeypatch.setattr(loader.TrainLoader, "_micro_batches", poisoned)
    with pytest.raises(NonFiniteError) as error:
        train_tiny("callbacks.checkpoint_every_samples=512")
    message = str(error.value)
    assert "loss term 'recon' is not finite at step 13, samples 3072 to 3328" in message
    cache_row = Order(6000, 4096, 8, 6000, 0).batch_rows(3072, 256)[37]
    assert f"not finite in the input: cache row {cache_row}" in message
    state = checkpoint_of(tmp_path / "run")
    assert state["sparsepilot"]["samples"] == 3072
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values() if isinstance(t, torch.Tensor))


def test_a_gradient_that_overflows_is_named(train_tiny, monkeypatch) -> None:
    from sparsepilot.autoencoders.topk import TopK

    original = TopK.project_gradients

    def overflow(self: TopK) -> None:
        original(self)
        assert self.b_enc.grad is not None
        self.b_enc.grad[5] = float("inf")

    monkeypatch.setattr(TopK, "project_gradients", overflow)
    with pytest.raises(NonFiniteError, match=r"gradient of b_enc is not finite at step 1.*every input row is finite"):
        train_tiny()


def test_a_checkpoint_of_another_shape_is_refused_before_a_tensor_is_copied(train_tiny, tmp_path: Path) -> None:
    train_tiny()
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("d_sae: 64", "d_sae: 32"))
    with pytest.raises(CheckpointError, match=r"W_enc has shape \[64, 16\], this run's has \[32, 16\]"):
        train_tiny("model.d_sae=32", "samples=7680")


def test_check_builds_one_batch_and_leaves_no_run(train_tiny, tmp_path: Path, capsys) -> None:
    sizes = train_tiny("check=true")
    assert sizes["parameters"] == f"{2 * 64 * 16 + 64 + 16:,}"
    assert sizes["samples per pass"].startswith("6,000")
    assert not (tmp_path / "run").exists()
    assert "check passed" in capsys.readouterr().out
