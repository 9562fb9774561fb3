"""The reading benchmark runs and prints what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # a process that imports torch, writes 10 MB in small synced files and reads them eight ways
def test_it_runs_at_a_tiny_size() -> None:
    script = Path(__file__).parents[3] / "benchmarks/read_cache.py"
    done = subprocess.run(
        [sys.executable, script, "--gib", "0.01", "--repeats", "0", "--window-mb", "4", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert {"memmap sequential", "memmap shuffled rows", "loader shuffled"} <= result["gb_per_s"].keys()
    assert all(v > 0 for figures in result["gb_per_s"].values() for v in figures.values())
