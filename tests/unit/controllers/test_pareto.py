"""`pareto` on simulated plants: every value in turn, each recorded once, with what held-out rows had there."""

from __future__ import annotations

import math
from typing import Any

import pytest
from plants import BATCH, Simulated, penalty

from sparsepilot.controllers.base import Controller, Measured
from sparsepilot.controllers.pareto import Pareto

STEPS = 8000
"""100 lags for each value: in 50 the inner loop does not settle within 2%."""
TARGETS = [128.0, 64.0, 32.0, 16.0]


def run(
    controller: Controller, plant: Simulated, num_steps: int = STEPS, first: int = 0, regular: int = 500
) -> list[tuple[int, dict[str, float]]]:
    """(step, what the controller added) of each validation that it added something to, made as callbacks/validate.py
    makes them: every `regular` steps, where it is wanted, and at the end."""
    pending: Measured | None = None
    found = []
    for n in range(first + 1, num_steps + 1):
        measured = plant.step(controller.strength)
        controller.update(pending, n * BATCH)
        pending = measured
        if controller.wants_validation(n * BATCH) or n % regular == 0 or n == STEPS:
            l0 = math.exp(plant.y)
            row = {"val/l0": l0, "val/fvu": l0**-0.5, "val/ce": 2.8 + l0**-0.5}
            added = controller.observe(row, n * BATCH)
            found += [(n, {**added, "seen": l0})] if added else []
    return found


def bound(plant: Simulated, **settings: Any) -> Pareto:
    made = Pareto(targets=TARGETS, **settings)
    made.bind(penalty(plant.right, STEPS))
    return made


@pytest.mark.parametrize("gain", [0.5, 1.0, 4.0])
def test_every_value_is_visited_in_turn_and_recorded_once(gain: float) -> None:
    plant = Simulated(gain=gain, noise=0.01)
    records = run(bound(plant), plant)
    assert [record["frontier/target"] for _, record in records] == TARGETS
    for step, record in records:
        assert record["frontier/settled"] == 1, (step, record)
        assert record["frontier/l0"] == record["seen"] == pytest.approx(record["frontier/target"], rel=0.02)
        assert record["frontier/fvu"] == record["seen"] ** -0.5
        assert record["frontier/ce"] == 2.8 + record["seen"] ** -0.5
    steps = [step for step, _ in records]
    assert steps == pytest.approx([2000, 4000, 6000, 8000], abs=2)  # an equal share each
    assert steps[-1] == STEPS


def test_a_value_that_settles_early_leaves_its_time_to_the_rest() -> None:
    plant = Simulated(gain=4.0)
    records = run(bound(plant, travel=0.2, hold=0.4), plant)
    assert [record["frontier/target"] for _, record in records] == TARGETS
    assert all(record["frontier/settled"] == 1 for _, record in records)
    assert records[0][0] < 1990
    assert records[-1][0] == STEPS


def test_a_value_out_of_reach_is_recorded_as_not_settled_and_left() -> None:
    plant = Simulated(gain=1.0, floor=math.log(40))
    records = run(bound(plant), plant)
    assert [(r["frontier/target"], r["frontier/settled"]) for _, r in records] == [(128, 1), (64, 1), (32, 0), (16, 0)]


def test_a_measured_l0_of_nothing_at_all_is_survived() -> None:
    plant = Simulated()
    controller = bound(plant)
    for n in range(1, 200):
        strength = controller.update(Measured([math.nan, 0.0, math.inf][n % 3]), n * BATCH)
        assert controller.loop.lowest <= strength <= controller.loop.highest
    assert [record["frontier/target"] for _, record in run(controller, plant, first=200)] == TARGETS
