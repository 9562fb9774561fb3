"""`l0_target` on a k: what the loop believes of held-out rows, and what shakes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from plants import BATCH, D_SAE, penalty

from sparsepilot.controllers.base import Measured
from sparsepilot.controllers.l0_target import L0Target

STEPS, VALIDATE_EVERY = 1000, 50


def k_run(
    controller: L0Target,
    *,
    whole: bool = False,
    fires: float = math.inf,
    held_out: Callable[[int, float], float] = lambda n, l0: 0.9 * l0,
    disturb: tuple[int, float] = (0, 1.0),
) -> list[float]:
    """L0 of held-out rows after each step, 0.9 of training's where nothing else is said; of `fires` latents a row at
    most. The controller hears of a step one step later."""
    controller.bind(penalty(32.0, STEPS, kind="k", low=1.0, high=float(D_SAE), whole=whole))
    found, pending = [], None
    for n in range(1, STEPS + 1):
        l0 = min(fires, float(round(controller.strength)) if whole else controller.strength)
        found.append(held_out(n, l0))
        controller.update(pending, n * BATCH)
        pending = Measured(l0)
        if n % VALIDATE_EVERY == 0:
            controller.observe({"val/l0": found[-1]}, n * BATCH)
        if n == disturb[0]:
            controller.disturb(disturb[1])
    return found


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("factor", [100.0, 1.3, 0.5, 0.02])
def test_a_k_in_use_that_is_disturbed_is_back_in_a_few_lags(factor: float, whole: bool) -> None:
    """Well before the next validation: training's L0 tells."""
    controller, after = L0Target(target_l0=32.0), 555
    found = k_run(controller, whole=whole, disturb=(after, factor))
    assert found[after - 1] == pytest.approx(32, rel=0.02)
    assert found[after] == pytest.approx(max(0.9, min(0.9 * D_SAE, factor * 32)), rel=0.03)
    assert all(abs(l0 / 32 - 1) < 0.05 for l0 in found[after + 100 :])
    assert found[-1] == pytest.approx(32, rel=0.02)
    assert controller.readings()["error"] == pytest.approx(math.log(found[-1] / 32), abs=0.02)


def test_a_k_that_moves_or_that_too_few_latents_fire_for_is_what_was_asked_for() -> None:
    controller = L0Target(trajectory=[[0.0, 400.0], [0.3, 400.0], [0.8, 20.0]])
    k_run(controller, fires=150.0, held_out=lambda n, l0: l0)
    assert controller.strength == pytest.approx(20.0, rel=1e-3)


def test_one_validation_that_meets_an_upset_teaches_nothing_and_a_second_does() -> None:
    met = L0Target(target_l0=32.0)
    found = k_run(met, held_out=lambda n, l0: (0.3 if n == 500 else 0.9) * l0)
    assert found[520] == pytest.approx(32, rel=0.01)
    changed = L0Target(target_l0=32.0)
    found = k_run(changed, held_out=lambda n, l0: (1.0 if n < 500 else 0.8) * l0)
    assert found[520] == pytest.approx(0.8 * 32, rel=0.01)
    assert found[-1] == pytest.approx(32, rel=0.01)
