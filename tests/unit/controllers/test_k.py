"""`l0_target` on a k: what the loop believes of held-out rows, and what shakes it."""

from __future__ import annotations

import math

import pytest
from plants import BATCH, D_SAE, penalty

from sparsepilot.controllers.base import Measured
from sparsepilot.controllers.l0_target import L0Target


def test_a_k_that_is_disturbed_stays_so_until_validations_have_told() -> None:
    """Held-out rows have an L0 of 0.9 k; the k in use is doubled at half of the run."""
    controller = L0Target(target_l0=32.0)
    controller.bind(penalty(32.0, 1000, kind="k", low=1.0, high=float(D_SAE)))
    held_out = []
    for n in range(1, 1001):
        controller.update(Measured(controller.strength), n * BATCH)
        held_out.append(0.9 * controller.strength)
        if n % 50 == 0:
            controller.observe({"val/l0": held_out[-1]}, n * BATCH)
        if n == 510:
            before = controller.strength
            controller.disturb(1.0)  # nothing at all
            assert controller.strength == before
            controller.disturb(1.3)
            assert controller.strength == pytest.approx(1.3 * before)
    assert held_out[500] == pytest.approx(32, rel=0.01)
    assert held_out[510] == pytest.approx(1.3 * 32, rel=0.01)
    assert held_out[530] == pytest.approx(1.3 * 32, rel=0.05)
    assert held_out[-1] == pytest.approx(32, rel=0.02)
    assert math.isfinite(controller.strength)
