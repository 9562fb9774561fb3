"""`callbacks.disturb` does what it says, once. (That a killed run has it behind it: test_control.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepilot.errors import ConfigError
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


def test_where_it_was_it_stays_under_a_longer_budget(train_tiny, tmp_path: Path) -> None:
    """Half of the new budget is another place: the run is not disturbed a second time there."""
    words = (*EIGHTY, "schedule=constant", "callbacks.disturb={at: 0.5, lr: 3}", f"run_dir={tmp_path}/shaken")
    train_tiny(*words, "samples=10240")
    train_tiny(*words)
    rates = [row["train/lr"] for row in read_rows(tmp_path / "shaken" / "metrics.jsonl") if "train/lr" in row]
    assert [number for number, rate in enumerate(rates) if rate != rates[0]] == [20]
    with pytest.raises(ConfigError, match=r"begun with another configuration \(callbacks.disturb"):
        train_tiny(*words, "callbacks.disturb=null", "samples=40960")


def test_the_data_scale_leaves_fvu_about_the_mean(train_tiny, tmp_path: Path) -> None:
    """FVU over MSE is one over the data's variance in its own units, which the rows keep."""
    words = ("model=topk", "model.k=8", "controller=constant", "callbacks.validate_every_samples=1024")
    train_tiny(*EIGHTY, *words, "callbacks.disturb={at: 0.5, data_scale: 3}", f"run_dir={tmp_path}/shaken")
    rows = [row for row in read_rows(tmp_path / "shaken" / "metrics.jsonl") if "val/fvu" in row]
    assert len(rows) == 20
    shares = [row["val/fvu"] / row["val/mse"] for row in rows]
    assert shares == pytest.approx([shares[0]] * 20, rel=1e-5)
