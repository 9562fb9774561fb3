"""`ramp` and `constant`, and what else the clock alone decides."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plants import penalty

from sparsepilot.controllers.base import Measured, Plant
from sparsepilot.controllers.constant import Constant
from sparsepilot.controllers.l0_target import L0Target
from sparsepilot.controllers.ramp import Ramp

HALF = {"linear": 5.0, "cosine": 5.0, "log": math.sqrt(2 * 8)}
QUARTER = {"linear": 3.5, "cosine": 2 + 6 * (1 - math.cos(math.pi / 4)) / 2, "log": 2 * 4**0.25}


def plant(total_samples: int = 10_000) -> Plant:
    return penalty(8.0, 1, total_samples=total_samples)


@pytest.mark.parametrize("in_samples", [False, True])
@pytest.mark.parametrize("shape", ["linear", "cosine", "log"])
def test_a_ramp_waits_goes_in_its_shape_and_holds(shape: str, in_samples: bool) -> None:
    times = {"wait_samples": 1000, "ramp_samples": 4000} if in_samples else {"begin": 0.1, "until": 0.5}
    ramp = Ramp(start=2.0, shape=shape, **times)
    ramp.bind(plant())
    assert ramp.strength == pytest.approx(2)
    at = {n: ramp.update(Measured(math.nan), n) for n in (0, 999, 1000, 2000, 3000, 5000, 9999, 20_000)}
    expected = [2, 2, 2, QUARTER[shape], 5 if shape != "log" else HALF[shape], 8, 8, 8]
    assert list(at.values()) == pytest.approx(expected)
    assert ramp.readings() == {"strength": ramp.strength}


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.sampled_from(["linear", "cosine", "log"]), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3),
    st.integers(0, 5000), st.integers(1, 5000), st.integers(10_000, 10**9),
)  # fmt: skip
def test_in_samples_a_ramp_does_not_depend_on_the_budget_and_never_turns_back(
    shape: str, start: float, end: float, wait: int, length: int, budget: int
) -> None:
    ramps = [Ramp(start, end, shape, wait_samples=wait, ramp_samples=length) for _ in range(2)]
    for ramp, total in zip(ramps, (10_000, budget), strict=True):
        ramp.bind(plant(total))
    one, other = ([ramp.update(None, n) for n in range(0, 12_000, 250)] for ramp in ramps)
    assert one == other
    assert one == sorted(one, reverse=end < start)
    assert one[-1] == pytest.approx(end)
    assert min(start, end) * (1 - 1e-9) <= min(one)
    assert max(one) <= max(start, end) * (1 + 1e-9)


def test_constant_stays_whatever_is_measured() -> None:
    constant = Constant()
    constant.bind(plant())
    assert {constant.update(measured, 256) for measured in (None, Measured(math.nan), Measured(1e9))} == {8.0}


def test_what_is_planned_in_shares_moves_with_the_budget() -> None:
    """What a run that is resumed with a longer one says."""
    ramp = Ramp(start=1.0, end=5.0, until=0.5)
    ramp.bind(penalty(2.0, 1000))
    assert ramp.planned(500, 1000) == 5.0
    assert ramp.planned(500, 2000) == 3.0
    in_samples = Ramp(start=1.0, end=5.0, wait_samples=0, ramp_samples=400)
    in_samples.bind(penalty(2.0, 1000))
    assert in_samples.planned(500, 1000) == in_samples.planned(500, 9000) == 5.0
    held = L0Target(trajectory=[[0.0, 64.0], [1.0, 16.0]])
    assert held.planned(1000, 1000) == 16.0
    assert held.planned(1000, 2000) == pytest.approx(32.0)
    assert L0Target(target_l0=8.0).planned(1000, 2000) is Constant().planned(1000, 2000) is None
