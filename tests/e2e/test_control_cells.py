"""Cells of benchmarks/control_grid.py, of fewer steps: does control arrive, judged as the campaign judges?"""

from __future__ import annotations

from pathlib import Path

import control_grid
import pytest
from control.cells import MODELS, initial_strength, validated

from sparsepilot.rows import read_rows

pytestmark = pytest.mark.slow  # five runs of 1,600 to 2,400 steps

BATCH = 256
PLANT = (
    "data.build.num_rows=60_000", "data.build.num_val_rows=4096", "data.build.d_in=64", "data.build.num_features=128",
    "data.build.mean_active=8", "data.build.noise=0.1", "model.d_sae=256", f"batch={BATCH}",
    "optimizer.lr=2e-3", "schedule=warmup_stable_decay", "callbacks.log_every_steps=1", "callbacks.keep_best=0",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "target", "start", "num_steps"),
    [
        ("relu", 8, 100.0, 1600),
        ("jumprelu", 16, 100.0, 2400),  # thresholds settle in so many steps, not in a share of them
        ("relu tanh", 8, 0.01, 2400),  # it integrates, too
        ("jumprelu wide", 8, 1.0, 1600),
        ("batchtopk", 8, 1.0, 1600),
    ],
)
def test_a_cell_meets_all_that_the_grid_asks(
    train_tiny, tmp_path: Path, model: str, target: int, start: float, num_steps: int
) -> None:
    train_tiny(
        *PLANT, *MODELS[model], "controller=l0_target", f"controller.target_l0={target}",
        *initial_strength(model, start), f"run_dir={tmp_path / 'run'}", f"samples={BATCH * num_steps}",
        *validated(model, BATCH * num_steps),
    )  # fmt: skip
    cell = control_grid.judge(list(read_rows(tmp_path / "run" / "metrics.jsonl")), target, model)
    assert control_grid.passes(cell), cell
