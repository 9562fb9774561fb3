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


def test_between_two_steps_it_is_for_the_next_one(train_tiny, tmp_path: Path) -> None:
    """1% of 20 steps is less than one."""
    words = (*EIGHTY, "samples=5120", "schedule=constant", "callbacks.disturb={at: 0.51, lr: 3}")
    rates = [row["train/lr"] for row in rows_of(train_tiny, tmp_path / "shaken", *words)]
    assert [number for number, rate in enumerate(rates) if rate != rates[0]] == [11]


def test_a_finished_run_that_is_started_again_has_the_same_dictionary(train_tiny, tmp_path: Path) -> None:
    words = (*EIGHTY, "callbacks.disturb={at: 0.5, data_scale: 3}", f"run_dir={tmp_path}/shaken")
    train_tiny(*words)
    first = (tmp_path / "shaken" / "sae.safetensors").read_bytes()
    train_tiny(*words)
    assert (tmp_path / "shaken" / "sae.safetensors").read_bytes() == first


def test_a_threshold_of_the_batch_falls_to_0_at_most(train_tiny, tmp_path: Path) -> None:
    """All that is positive fires then on held-out rows, and k of them in training, where it finds its way back."""
    words = ("model=batchtopk", "model.k=8", "controller=constant", "callbacks.validate_every_samples=256")
    train_tiny(*EIGHTY, *words, "callbacks.disturb={at: 0.5, thresholds: -5}", f"run_dir={tmp_path}/shaken")
    rows = read_rows(tmp_path / "shaken" / "metrics.jsonl")
    l0 = [row["val/l0"] for row in rows if "val/l0" in row]
    assert l0[FIRST - 1] > 2 * l0[FIRST - 2]
    assert l0[-1] == pytest.approx(8, rel=0.1)


def test_the_data_scale_leaves_fvu_about_the_mean(train_tiny, tmp_path: Path) -> None:
    """FVU over MSE is one over the data's variance in its own units, which the rows keep."""
    words = ("model=topk", "model.k=8", "controller=constant", "callbacks.validate_every_samples=1024")
    train_tiny(*EIGHTY, *words, "callbacks.disturb={at: 0.5, data_scale: 3}", f"run_dir={tmp_path}/shaken")
    rows = [row for row in read_rows(tmp_path / "shaken" / "metrics.jsonl") if "val/fvu" in row]
    assert len(rows) == 20
    shares = [row["val/fvu"] / row["val/mse"] for row in rows]
    assert shares == pytest.approx([shares[0]] * 20, rel=1e-5)
