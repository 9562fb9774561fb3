"""Several dictionaries in one run: each is the run alone, bit for bit, whatever the others do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from killing.compare import value_differences
from omegaconf import OmegaConf

import sparsepilot
from sparsepilot.callbacks.checkpoint_io import list_checkpoints
from sparsepilot.errors import CheckpointError, NonFiniteError
from sparsepilot.reporting.labels import labels
from sparsepilot.reporting.runs import read_runs
from sparsepilot.rows import read_rows, rows_of_trainee
from sparsepilot.run_folder import RunFolder

LONG = ("samples=5120", "callbacks.validate_every_samples=1280")
OWN: dict[str, tuple[str, ...]] = {
    # dead latents that AuxK revives
    "top": ("model.sites=[a]", "model.d_sae=96", "model.k=2"),
    # a loop that hears of every validation
    "jump": (
        *("model=jumprelu", "model.sites=[b,c]", "model.d_sae=40", "optimizer.lr=4e-3"),
        *("controller=l0_target", "controller.target_l0=6"),
    ),
    # asks for validations of its own
    "steps": (
        *("model=batchtopk", "model.sites={read:[a],write:[c]}", "model.skip=true", "model/revival=none", "model.d_sae=56"),
        *("controller=pareto", "controller.targets=[12,7,4]", "controller.lag_steps=2", "controller.hold=0.5"),
    ),
    # draws in training, and clips often
    "drawn": (
        *("model=topk", "model.sites=[b]", "model.d_sae=80", "model.k=1", "model/prefixes=random"),
        *("model/revival=resample", "model.revival.every_samples=1024"),
    ),
}
"""Each trainee's overrides as its run alone has them."""


def of_trainee(name: str, overrides: tuple[str, ...]) -> list[str]:
    """The same overrides for a trainee: a group's option in its own package, fields below its name."""
    chosen = {o.partition("=")[0] for o in overrides}
    given = []
    for override in overrides:
        field, _, value = override.partition("=")
        if "." in field:
            given.append(f"++trainees.{name}.{override}")
        else:  # a part of an option that is chosen, too, is there already
            new = "" if field.partition("/")[0] in chosen - {field} else "+"
            given.append(f"{new}{field}@trainees.{name}.{field.replace('/', '.')}={value}")
    return given


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder / "metrics.jsonl"))


def state_of(folder: Path, name: str) -> dict[str, Any]:
    """Everything in the last checkpoint that is a trainee's."""
    checkpoint = torch.load(list_checkpoints(folder / "checkpoints")[0][1], weights_only=True)
    begin = f"trainees.{name}."
    return {key.removeprefix(begin): v for key, v in checkpoint["state_dict"].items() if key.startswith(begin)}


def test_each_is_its_run_alone_bit_for_bit(train_sites, tmp_path: Path) -> None:
    several = tmp_path / "several"
    train_sites(*LONG, f"run_dir={several}", *(o for name, own in OWN.items() for o in of_trainee(name, own)))
    for name, own in OWN.items():
        alone = tmp_path / name
        train_sites(*LONG, f"run_dir={alone}", *own)
        assert list(rows_of_trainee(rows_of(several), name, OWN)) == rows_of(alone), name
        assert list(value_differences(name, state_of(several, name), state_of(alone, "sae"))) == []
        for file in ("sae.safetensors", "sae.json"):
            assert (several / name / file).read_bytes() == (alone / file).read_bytes(), (name, file)
        configs = [OmegaConf.load(folder / "config.yaml") for folder in (several / name, alone)]
        for config in configs:
            config.run_dir = ""
        assert configs[0] == configs[1]
    validated = {name: [r["step"] for r in rows_of(several) if f"{name}/val/l0" in r] for name in OWN}
    assert set(validated["steps"]) > set(validated["jump"])  # what one asks for is measured for that one alone
    assert max(row.get("drawn/train/dead_latents", 0) for row in rows_of(several)) > 0
