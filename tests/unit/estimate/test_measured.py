"""Estimates against what is measured, within 15%: memory of processes, files on disk, time of a run's steps."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from sparsepilot.data import synthetic
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create
from sparsepilot.estimate.calibration import Calibration
from sparsepilot.estimate.disk import cache_bytes
from sparsepilot.estimate.report import estimate
from sparsepilot.estimate.speed import from_corners

WITHIN = 0.15
Compose = Callable[..., DictConfig]
MEASURED_RUN = Path(__file__).parents[2] / "measured_run.py"
WIDTH = 512
STEPS = 6


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache of wide rows."""
    path = tmp_path_factory.mktemp("rows") / "cache"
    synthetic.build(
        path, num_rows=8192, num_val_rows=1024, d_in=WIDTH, num_features=1024, mean_active=16, noise=0.02, seed=0
    )
    return path


@pytest.mark.slow  # each takes some steps of some hundred MiB in a process of its own
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read and reset as Linux does")
@pytest.mark.parametrize("model", [("model=topk", "model.k=32", "model.d_sae=20480")], ids=["topk, Adam"])
def test_memory_of_a_run(model: tuple[str, ...], rows: Path, tmp_path: Path, compose_cfg: Compose) -> None:
    batch = 1024
    overrides = [
        *model, "data=cache", f"data.path={rows}", "data.sites=[synthetic]", f"batch={batch}",
        f"samples={STEPS * batch}", "threads=1", "logger=none", "report=false", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(MEASURED_RUN), *overrides],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    found = estimate(compose_cfg(*overrides), {"dead": 0.0})
    said = found["memory_bytes"]["total"] - found["memory_bytes"]["base"]
    took = measured["peak_bytes"] - measured["base_bytes"]
    print(json.dumps(found["memory_bytes"], indent=1))
    print(f"{model}: said {said / 2**20:.0f} MiB, took {took / 2**20:.0f}")
    assert took > 400 * 2**20
    assert abs(said / took - 1) < WITHIN

    folder = tmp_path / "run"
    checkpoint = next((folder / "checkpoints").glob("samples-*.ckpt")).stat().st_size
    assert found["disk_bytes"]["one checkpoint"] == pytest.approx(checkpoint, rel=0.01)
    dictionary = (folder / "sae.safetensors").stat().st_size
    assert found["disk_bytes"]["the trained dictionary"] == pytest.approx(dictionary, rel=0.01)
    assert found["disk_bytes"]["cache (there)"] == sum(f.stat().st_size for f in rows.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    "plan",
    [
        CachePlan(5000, 300, {"a": 48}, "float32"),
        CachePlan(5000, 300, {"a": 48, "b": 16}, "bfloat16", chunk_rows=32, shard_rows=256),  # the last shard is short
        CachePlan(3000, 0, {"a": 64}, "int8", chunk_rows=16, shard_rows=1024),
        CachePlan(100, 20, {"a": 512}, "float16", chunk_rows=64, shard_rows=64),
    ],
    ids=lambda plan: f"{plan.dtype}, {plan.num_shards} shards",
)
def test_size_of_a_cache_before_it_is_written(plan: CachePlan, tmp_path: Path) -> None:
    create(tmp_path / "cache", plan)
    writer = CacheWriter(tmp_path / "cache")
    make = torch.Generator().manual_seed(0)
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    for part in writer.pending():
        numbers = np.arange(part.start, part.stop)
        x = {site: torch.randn(len(part), d, generator=make).to(types.get(plan.dtype, torch.float32))
             for site, d in plan.widths.items()}  # fmt: skip
        writer.write_shard(part, x, numbers, numbers, numbers)
    writer.finish()
    there = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert cache_bytes(plan) == pytest.approx(there, rel=0.05)


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch) -> Any:
    import stepping

    return stepping


@pytest.mark.timing
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize(
    ("model", "d_sae", "batch", "l0"),
    [("topk", 16384, 2048, None), ("relu", 4096, 1024, None), ("jumprelu", 16384, 1024, 32.0)],
    ids=["topk", "relu, dense", "jumprelu at L0 32"],
)
def test_time_of_a_step_from_smaller_ones(
    model: str, d_sae: int, batch: int, l0: float | None, stepping: Any, tmp_path: Path
) -> None:
    """CPU seconds of whole turns of Lightning's loop against an extrapolation from bare steps with an eighth and
    half of its rows and latents. They take turns in one process, so that what else the machine does hits both alike;
    CPU time, not the clock on the wall, because others use the machine; medians."""
    settings = stepping.Settings(
        model=model, d_in=256, d_sae=d_sae, k=32, l0=l0, batch=batch, threads=1, rows=8192, scratch=str(tmp_path)
    )
    run = stepping.Run(settings, tmp_path / "run")
    widths = dict(run.data.cache.widths)
    x_BD = run.data.cache.read(stepping.SITE, 0, batch)
    calibration = Calibration(run.cfg, widths, batch, l0, x_BD=x_BD)
    turns: list[float] = []
    began_s = [0.0]

    def begin() -> None:
        began_s[0] = time.process_time()

    def between(_: float, row: dict[str, Any]) -> bool:
        turns.append(time.process_time() - began_s[0])
        calibration.round(time.process_time)
        begin()
        return len(turns) < 10

    run.fit(between, begin)
    took_s = statistics.median(turns[2:])
    corners = calibration.corners(warmup=2)
    said_s = from_corners(corners, batch, d_sae)
    print(f"{model}: said {said_s * 1e3:.1f} ms, took {took_s * 1e3:.1f} ms; {corners}; turns {turns}")
    assert abs(said_s / took_s - 1) < WITHIN
