"""Saved in the middle of any trajectory and loaded into a fresh controller, every controller goes on bit for bit."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plants import BATCH, D_SAE, Simulated, penalty

from sparsepilot.controllers.base import Controller, Measured
from sparsepilot.controllers.constant import Constant
from sparsepilot.controllers.constrained import Constrained
from sparsepilot.controllers.l0_target import L0Target
from sparsepilot.controllers.pareto import Pareto
from sparsepilot.controllers.ramp import Ramp

STEPS = 400
MAKERS: dict[str, Callable[[], Controller]] = {
    "constant": lambda: Constant(strength=3.0),
    "ramp": lambda: Ramp(start=0.5, shape="cosine"),
    "l0_target": lambda: L0Target(target_l0=32.0),
    "l0_target reference": lambda: L0Target(trajectory=[[0.0, 1000.0], [0.5, 64.0], [1.0, 32.0]]),
    "constrained ce": lambda: Constrained(quality="ce_gap", target=0.2),
    "constrained fvu": lambda: Constrained(quality="fvu", target=0.2),
    "pareto": lambda: Pareto(targets=[128.0, 64.0, 32.0], hold=0.5),
}


def test_every_controller_of_the_configuration_is_here() -> None:
    files = {file.stem for file in (ROOT / "conf" / "controller").glob("*.yaml")}
    assert files == {name.split()[0] for name in MAKERS}


def make(name: str, kind: str) -> Controller:
    controller = MAKERS[name]()
    k = {"kind": "k", "low": 1.0, "high": float(D_SAE)} if kind == "k" else {}
    controller.bind(penalty(64.0 if kind == "k" else 0.3, STEPS, **k))
    return controller


def go_on(controller: Controller, plant: Simulated, pending: Measured | None, first: int, last: int) -> list[Any]:
    """All that a controller says from step `first` to `last`, and at the end the measurement that it has not heard."""
    said: list[Any] = []
    for n in range(first + 1, last + 1):
        measured = plant.step(controller.strength)
        said.append(controller.update(pending, n * BATCH))
        pending = measured._replace(fvu=measured.l0**-0.4)
        if controller.wants_validation(n * BATCH) or n % 30 == 0:
            l0 = math.exp(plant.y)
            row = {"val/l0": 1.1 * l0, "val/fvu": l0**-0.5, "val/ce": 2.8 + l0**-0.5, "val/ce_clean": 2.8}
            said.append(controller.observe({**row, "val/ce_mean": 4.0}, n * BATCH))
        said.append(controller.readings())
    return [*said, pending]


def leaves(value: Any) -> list[Any]:
    """What a state is made of, all the way down; tuples are leaves here, and so refused below."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in [key, *leaves(part)]]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("kind", ["penalty", "k"])
@pytest.mark.parametrize("name", MAKERS)
@settings(derandomize=True, deadline=None, max_examples=12, phases=[Phase.generate])
@given(st.integers(0, STEPS - 1))
@pytest.mark.filterwarnings("ignore:controller.target")  # of these plants some meet theirs, some do not
def test_a_cut_anywhere_changes_no_bit(name: str, kind: str, cut: int) -> None:
    whole, plant = make(name, kind), Simulated(noise=0.02, slew=0.1)
    *_, pending = go_on(whole, plant, None, 0, cut)
    state = whole.state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {str, int, float, bool, type(None)}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = make(name, kind)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert repr(resumed.state_dict()) == repr(state)
    assert (resumed.strength, resumed.readings()) == (whole.strength, whole.readings())
    other = copy.deepcopy(plant)
    assert repr(go_on(whole, plant, pending, cut, STEPS)) == repr(go_on(resumed, other, pending, cut, STEPS))
    assert repr(resumed.state_dict()) == repr(whole.state_dict())
