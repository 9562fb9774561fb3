"""`callbacks.disturb` does what it says, once. (That a killed run has it behind it: test_control.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepilot.rows import read_rows

EIGHTY = ("samples=20480", "callbacks.log_every_steps=1", "model=jumprelu", "controller=l0_target", "report=false")
FIRST = 40
"""the step after which all is otherwise: half of 80"""


def rows_of(train_tiny, run_dir: Path, *words: str) -> list[dict[str, float]]:
    train_tiny(*EIGHTY, *words, f"run_dir={run_dir}")
    return [row for row in read_rows(run_dir / "metrics.jsonl") if "train/loss" in row]


@pytest.fixture
def calm(train_tiny, tmp_path: Path) -> list[dict[str, float]]:
    return rows_of(train_tiny, tmp_path / "calm")


@pytest.mark.parametrize(
    ("what", "key", "factor"),
    [
        ("strength: 100", "controller/strength", 50.0),
        ("lr: 3", "train/lr", 2.99),
        ("data_scale: 2", "train/loss_recon", 2.0),
        ("thresholds: 1", "train/l0", 0.9),
    ],
)
def test_each_disturbs_from_its_place_on(train_tiny, tmp_path: Path, calm, what: str, key: str, factor: float) -> None:
    rows = rows_of(train_tiny, tmp_path / "shaken", f"callbacks.disturb={{at: 0.5, {what}}}")
    ratios = [shaken[key] / quiet[key] for shaken, quiet in zip(rows, calm, strict=True)]
    assert ratios[:FIRST] == [1.0] * FIRST
    soon = ratios[FIRST : FIRST + 2]
    assert max(soon) >= factor if factor > 1 else min(soon) <= factor
    if key == "train/lr":  # for 1% of 80 steps
        assert ratios[FIRST] == pytest.approx(3)
        assert ratios[FIRST + 1 :] == [1.0] * (79 - FIRST)
