"""From a language model to a trained dictionary: two writers, one of them killed, then a run on what they wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from rich.console import Console

import sparsepilot
from sparsepilot.caching import build_cache
from sparsepilot.config.check import check_cache
from sparsepilot.errors import DataError
from sparsepilot.run import train

SITES = "data.sites=[model.layers.*.mlp,'model.layers.2:in']"


@pytest.mark.slow  # three processes, each of which imports torch and transformers
def test_two_writers_one_killed_then_a_run(tiny_folder: Path, tmp_path: Path, compose_cfg) -> None:
    for number in range(30):
        words = " ".join("abcdefgh"[(number + i * i) % 8] for i in range(5 + number))
        (tmp_path / f"{number}.txt").write_text(words)
    common = (
        "data=lm",
        SITES,
        "data.build.context_length=16",
        "data.build.chunk_rows=16",
        "data.build.shard_rows=64",
        "data.build.val_fraction=0.2",
        "data.build.dtype=float32",
        "lm=hf",
        f"lm.id={tiny_folder}",
        "lm.dtype=float32",
        "text=files",
        f"text.paths=[{tmp_path}/*.txt]",
    )

    def write(rank: int, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "scripts" / "cache_activations.py", *common]
        command += [f"data.path={tmp_path}/shared", f"rank={rank}", "world=2"]
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
        )

    killed = write(1, SPARSEPILOT_FAULT="cache-shard-write:2")
    assert killed.returncode == -9, killed.stderr
    assert "the cache is sealed when the others are" in write(0).stdout
    with pytest.raises(DataError, match="unfinished, .* shards are missing; start its writer again"):
        train(compose_cfg("data=cache", f"data.path={tmp_path}/shared", "data.sites=[a]", f"run_dir={tmp_path}/no"))
    done = write(1)
    assert "training and" in done.stdout, done.stderr

    plain = check_cache(compose_cfg(*common, f"data.path={tmp_path}/alone", config="cache"))
    alone = build_cache(plain["data"], plain["lm"], plain["text"], console=Console(quiet=True))
    shared = sparsepilot.data.cache.Cache(tmp_path / "shared")
    assert alone is not None
    assert shared.fingerprint == alone.fingerprint
    assert set(shared.widths) == {f"model.layers.{i}.mlp" for i in range(4)} | {"model.layers.2:in"}

    summary = train(
        compose_cfg(
            "data=cache",
            f"data.path={tmp_path}/shared",
            "data.sites=[model.layers.1.mlp,model.layers.3.mlp]",
            "data.num_streams=8",
            "model.d_sae=32",
            "model.k=4",
            "batch=64",
            "samples=1280",
            "logger=none",
            f"run_dir={tmp_path}/run",
        )
    )
    assert summary["samples"] == 1280
    assert summary["metrics"]["val/l0"] <= 4
    saved = sparsepilot.load(tmp_path / "run")
    assert saved.W_enc.shape == (64, 32)
    assert saved.cfg["sites"] == ["model.layers.1.mlp", "model.layers.3.mlp"]
