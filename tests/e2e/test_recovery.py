"""The planted dictionary is found again by the run that `python train.py data=synthetic` makes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow  # 500,000 samples, about 15 s
def test_the_planted_dictionary_is_recovered(compose_cfg, tmp_path: Path) -> None:
    from sparsepilot.run import train

    places = (f"data.path={tmp_path}/cache", f"run_dir={tmp_path}/run", "logger=none", "report=false")
    summary = train(compose_cfg("data=synthetic", *places))
    assert summary["metrics"]["val/recovery"] >= 0.95
    assert summary["metrics"]["val/l0"] <= 6
