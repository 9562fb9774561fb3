"""The benchmarks run and say what they promise, on shapes too small to mean anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference_run import write_reference_run
from warm import Warm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--d-in", "16", "--d-sae", "64", "--k", "4", "--batch", "128", "--rows", "1024", "--threads", "1"]


Run = Callable[..., str]


@pytest.fixture
def run(warm: Warm) -> Run:
    """run("train_step.py", "--steps", "4"): what it prints."""

    def run(script: str, *words: str) -> str:
        done = warm.script([str(BENCHMARKS / script), *TINY, *words])
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stepping

    return stepping


@pytest.mark.slow  # starts Lightning in a process
def test_train_step_prints_one_line_of_json(run: Run, tmp_path: Path) -> None:
    lines = run(
        "train_step.py", "--scratch", str(tmp_path), "--steps", "4", "--json", "model.revival.aux_k=3"
    ).splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result["samples_per_s"] > 0
    assert result["step_ms"]["q1"] <= result["step_ms"]["median"] <= result["step_ms"]["q3"]
    assert result["l0"] == 4
    assert result["model"]["revival"]["aux_k"] == 3
    assert result["steps"] == 4
    assert all(len(times) == 4 for times in result["seconds"].values())
    assert {"bare", "product", "product16"} <= set(result)
    assert result["lightning_logging_loading_share"] < 1
    assert {"loss_first", "loss_last", "versions", "settings", "machine"} <= set(result)
    assert not list(tmp_path.glob("tmp*"))  # the run's folder is gone, the cache stays


@pytest.mark.slow  # starts three processes with Lightning
def test_side_by_side_gives_rows_and_paired_ratios(run: Run, tmp_path: Path) -> None:
    ours = ["--ours", "ours=", "--ours", "k 8=model.k=8", "--ours", "wrong=model.kk=8"]
    report = tmp_path / "report.json"
    words = ["--scratch", str(tmp_path), "--rounds", "2", "--warmup", "1", "--pause", "0.05", "--json", str(report)]
    lines = run("side_by_side.py", *ours, *words).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| ours |")
    first, second, wrong = json.loads(report.read_text(encoding="utf-8"))["results"]
    assert first["ratio"]["ours"] == 1
    assert second["ratio"]["ours"] > 0
    assert len(first["seconds"]) == len(second["seconds"]) == 2
    assert (first["l0"], second["l0"]) == (4, 8)
    assert first["checksum"] == second["checksum"]
    assert "kk" in wrong["error"]


@pytest.mark.slow  # starts two processes
def test_memory_counts_the_state_and_reports_what_cannot_be_built(run: Run, tmp_path: Path) -> None:
    words = ["--scratch", str(tmp_path), "--steps", "1", "--tile-latents", "none", "0"]
    lines = run("memory.py", *words).splitlines()
    whole, tiled = json.loads(lines[0]), json.loads(lines[1])
    num_parameters = 2 * 64 * 16 + 64 + 16
    assert whole["parameters_mib"] == whole["gradients_mib"] == num_parameters * 4 / 2**20
    assert whole["optimizer_mib"] >= 2 * whole["parameters_mib"]
    assert whole["peak_mib"] >= whole["process_mib"]
    assert "tile_latents" in tiled["error"]  # no such option yet, or not a possible value


def test_rows_come_from_the_seed_and_their_number_alone(stepping: Any) -> None:
    x_BD = stepping.activations(3000, 48)
    assert torch.equal(stepping.activations(1500, 48), x_BD[:1500])
    assert torch.equal(stepping.activations(1500, 48, "bfloat16"), x_BD[:1500].bfloat16())
    assert not torch.equal(stepping.activations(1500, 48, seed=1), x_BD[:1500])
    assert abs(float(x_BD.square().sum(dim=1).mean()) / 48 - 1) < 0.05


@pytest.mark.parametrize("jump", [False, True])
def test_calibration_moves_one_kind_of_threshold_to_the_wanted_l0(stepping: Any, jump: bool) -> None:
    torch.manual_seed(0)
    W_FD = torch.nn.functional.normalize(torch.randn(256, 16))
    sae = SimpleNamespace(architecture="stub", b_enc=torch.zeros(256))
    if jump:
        sae.log_threshold = torch.full((256,), -7.0)

    def encode(x_BD: torch.Tensor) -> torch.Tensor:
        pre_BF = x_BD @ W_FD.T + sae.b_enc
        return pre_BF * (pre_BF > (sae.log_threshold.exp() if jump else 0))

    sae.encode = encode
    trainee = SimpleNamespace(autoencoder=sae, scaled=lambda x_BD: (2.0 * x_BD, 2.0 * x_BD))
    found = stepping.calibrate(trainee, torch.randn(512, 16), 12.0)
    assert abs(found - 12) < 0.1
    assert bool((sae.b_enc == 0).all()) == jump


def test_peers_are_named_and_their_scripts_need_nothing_of_ours() -> None:
    """The peers' environment lacks lightning, hydra and zarr."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import activations, worker, steps; "
        "assert not {'lightning', 'hydra', 'zarr', 'sparsepilot'} & set(sys.modules); print(len(steps.TOOLS))"
    )
    command = [sys.executable, "-c", code, str(BENCHMARKS / "peers")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout == "3\n", done.stderr


def test_trajectory_prints_how_a_run_kept_to_its_set_point(warm: Warm, tmp_path: Path) -> None:
    """The reference: on its trajectory with 2% of noise, and falling throughout."""
    folder = write_reference_run(tmp_path / "run", log_every_steps=1)
    done = warm.script([str(BENCHMARKS / "trajectory.py"), str(folder), "--shares", "0.5", "1"])
    assert done.returncode == 0, done.stderr
    *_, half, end, _, rms, falls, settled = done.stdout.splitlines()
    assert half.startswith("| 0.5 | 20.04 | ")
    assert end.startswith("| 1 | 4 | ")
    assert rms == "rms of the error over the last tenth: 2.0%"
    below, pairs = map(int, re.findall(r"\d+", falls.rpartition(":")[2]))
    assert (below > 190, pairs) == (True, 200)
    assert settled == "within 5% for good from 0% of the budget on"


def test_shrinkage_is_the_factor_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconstructions that are right but for 4/5 of their size, beside what no factor mends."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shrinkage import shrinkage

    x_BD = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)) + 3
    kept_D = torch.tensor([0.8] * 6 + [0.0] * 2)
    sae = SimpleNamespace(
        b_dec=torch.full((8,), 3.0), encode=lambda x: (x - 3) * kept_D, decode=lambda codes: codes + 3
    )
    found = shrinkage(sae, x_BD, x_BD.mean(0))  # type: ignore[arg-type]
    assert found["factor"] == pytest.approx(1.25)
    assert found["fvu_at_factor"] == pytest.approx(0.25, abs=0.01)
    assert found["fvu"] == pytest.approx(0.25 + 0.75 * 0.04, abs=0.01)
    assert found["l0"] == pytest.approx(3, abs=0.1)
