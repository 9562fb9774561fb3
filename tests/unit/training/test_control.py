"""Controllers in real runs: what they log, and that a killed run ends with the bits of an unbroken one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from killing.compare import run_differences
from warm import Warm

from sparsepilot.rows import read_rows

LONGER = ("samples=20480", "callbacks.validate_every_samples=4096", "callbacks.log_every_steps=1", "optimizer.lr=3e-3")
"""80 steps, validated at every 16th."""
CLOSED = {
    "l0_target": ("controller=l0_target", "controller.target_l0=6", "controller.reach=0.5"),
    "constrained": ("controller=constrained", "controller.target=0.3"),
    "pareto": ("controller=pareto", "controller.targets=[16,8,4]"),
}
OPEN = {"constant": (), "ramp": ("controller=ramp", "controller.start=2")}
EVERY = {"strength", "target", "measured", "error", "at_limit"}
QUALITY = {"quality", "quality_target"}


def logged(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The `controller/` figures of each training row, without the prefix."""
    found = [
        {key.removeprefix("controller/"): value for key, value in row.items() if key.startswith("controller/")}
        for row in rows
        if "train/loss" in row
    ]
    assert len(found) == 80
    return found


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("l0_target", "relu"),
        ("l0_target", "batchtopk"),
        ("constrained", "relu"),
        ("pareto", "batchtopk"),
        ("ramp", "topk"),
    ],
)
@pytest.mark.filterwarnings("ignore:controller.target = 0.3")  # met or not, within so few steps
def test_a_run_logs_what_readings_promises(train_tiny, tmp_path: Path, name: str, model: str) -> None:
    words = {**CLOSED, **OPEN}[name]
    train_tiny(*LONGER, f"model={model}", *words)
    rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    control = logged(rows)
    assert all(math.isfinite(value) for row in control for value in row.values())
    if name in OPEN:
        assert all(set(row) == {"strength"} for row in control)
        return
    # the first row stands before the first measurement has been heard: there is nothing but the knob to tell
    assert set(control[0]) == {"strength"}
    extra = QUALITY if name == "constrained" else set()
    if model == "batchtopk":
        assert all(set(row) == EVERY | extra for row in control[2:])
    else:
        assert all(EVERY | extra | {"p", "i", "plant_gain"} == set(row) for row in control[2:])
    for row in control[2:]:
        assert row["error"] == pytest.approx(math.log(row["measured"] / row["target"]), rel=1e-6, abs=1e-9)
        assert row["at_limit"] in (0, 1)
        assert row["strength"] > 0
    if name == "pareto":
        frontier = [row for row in rows if "frontier/target" in row]
        assert [row["frontier/target"] for row in frontier] == [16, 8, 4]
        assert all(row["frontier/l0"] == row["val/l0"] and row["frontier/fvu"] == row["val/fvu"] for row in frontier)


@pytest.mark.parametrize("target", [3, 8])
def test_a_target_in_the_loss_is_where_a_run_ends(train_tiny, tmp_path: Path, target: int) -> None:
    """Open loop, from an L0 of 32: JumpReLU's own quadratic penalty."""
    train_tiny(
        "model=jumprelu", f"model.target_l0={target}", "model.coefficient=30", "samples=51200", "optimizer.lr=5e-3"
    )
    *_, last = (row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "val/l0" in row)
    assert last["val/l0"] == pytest.approx(target, rel=0.1)


BREAKS = {
    "l0_target jumprelu, disturbed": (
        "model=jumprelu", *CLOSED["l0_target"],
        "callbacks.disturb={at: 0.25, data_scale: 1.2, strength: 3, thresholds: 0.02, lr: 2}",
    ),
    "constrained relu": ("model=relu", *CLOSED["constrained"]),
    "pareto batchtopk": ("model=batchtopk", *CLOSED["pareto"]),
}  # fmt: skip


@pytest.mark.slow  # three starts of train.py
@pytest.mark.parametrize("name", BREAKS)
def test_killed_on_the_way_to_its_target_a_run_ends_with_equal_bits(warm: Warm, tmp_path: Path, name: str) -> None:
    """Killed in step 33, one step after a validation and five after a checkpoint."""
    words = [*TINY, *LONGER, *BREAKS[name], f"data.path={tmp_path}/cache", "threads=1"]
    words += ["callbacks.checkpoint_every_samples=1792", "callbacks.checkpoint_every_minutes=1000"]
    whole, broken = (["train.py", *words, f"run_dir={tmp_path}/{folder}"] for folder in ("whole", "broken"))
    assert warm(whole, {}).code == 0
    ended = warm(broken, {"SPARSEPILOT_FAULT": "mid-step:33"})
    assert ended.code == -9, ended.out
    ended = warm(broken, {})
    assert ended.code == 0, ended.out
    assert run_differences(tmp_path / "whole", tmp_path / "broken") == []
    strengths = {row["strength"] for row in logged(list(read_rows(tmp_path / "broken" / "metrics.jsonl")))}
    assert len(strengths) > 10 or "pareto" in name  # it was in motion


def coherences(train_tiny, lr: float, folder: Path, steps: int = 6) -> list[float]:
    """JumpReLU's `coherence` as a run of a few steps saves it."""
    train_tiny(
        "model=jumprelu", "model.recipe=step", f"samples={256 * steps}", f"optimizer.lr={lr}", "schedule=constant",
        f"run_dir={folder}", "callbacks.checkpoint_every_samples=256", "callbacks.keep_last=9", "model.coefficient=30",
    )  # fmt: skip
    from sparsepilot.callbacks.checkpoint_io import list_checkpoints

    paths = [path for _, path in sorted(list_checkpoints(folder / "checkpoints"))]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    names = [name for name in states[0] if name.endswith("autoencoder.coherence")]
    return [float(state[names[0]]) for state in states]


def test_coherence_is_a_share_and_does_not_depend_on_the_learning_rate(train_tiny, tmp_path: Path) -> None:
    """At the first step Adam moves each threshold by the learning rate whatever its gradient."""
    one, other = (coherences(train_tiny, lr, tmp_path / f"{lr}") for lr in (1e-3, 1e-5))
    assert all(-1 <= value <= 1 for value in (*one, *other))
    assert one[0] == pytest.approx(other[0], rel=1e-3)
    assert one[0] > 0.9  # a penalty this strong pushes all of them up


def test_coherence_goes_on_where_a_run_is_resumed(train_tiny, tmp_path: Path) -> None:
    whole = coherences(train_tiny, 1e-3, tmp_path / "whole")
    coherences(train_tiny, 1e-3, tmp_path / "parts", steps=3)
    assert coherences(train_tiny, 1e-3, tmp_path / "parts") == whole
