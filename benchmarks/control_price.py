"""What does control cost? FVU of closed-loop runs beside constant coefficients interpolated to the same L0.

    python benchmarks/control_price.py --scratch /tmp/grid          # resumable; shares runs with control_grid.py
    python benchmarks/control_price.py --scratch /tmp/grid --table

For relu and jumprelu on the demo cache: runs of `controller=l0_target` from the default start strength and from 100
times it, and 8 runs of `controller=constant` whose coefficients lie around the strength that the first of them ended
with. Between the two constant runs with L0 on either side ln FVU is interpolated linearly in ln L0. Asked: at most 1%
worse.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise

from control.cells import Where, finished, initial_strength, rows_of, train, words_of

NUM_CONSTANT, SPREAD = 8, 2.0
"""Coefficients from 1 / SPREAD to SPREAD times the strength that the loop ended with, in equal ratios."""


def last_of(where: Where, name: str) -> tuple[float, float, float]:
    """(L0, FVU, strength) at the end of a run."""
    rows = rows_of(where, name)
    validation = [row for row in rows if "val/l0" in row][-1]
    strength = [row for row in rows if "controller/strength" in row][-1]["controller/strength"]
    return validation["val/l0"], validation["val/fvu"], strength


def interpolated(points: list[tuple[float, float]], l0: float) -> float:
    """FVU at an L0 between (L0, FVU) points; NaN outside of them.

    >>> round(interpolated([(10, 0.4), (40, 0.1)], 20), 6)
    0.2
    """
    for (low, fvu_low), (high, fvu_high) in pairwise(sorted(points)):
        if low <= l0 <= high:
            share = math.log(l0 / low) / math.log(high / low)
            return fvu_low ** (1 - share) * fvu_high**share
    return math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Where.arguments(parser)
    parser.add_argument("--models", nargs="+", default=["relu", "jumprelu"])
    parser.add_argument("--target", type=float, default=32.0)
    args = parser.parse_args()
    where = Where.of(args)
    print("| model | run | L0 | FVU | constant at that L0 | price |", "|---|---|---|---|---|---|", sep="\n")
    for model in args.models:
        loops = {start: f"demo-{model}-{args.target:g}-start{start:g}-seed0" for start in (1.0, 100.0)}
        for start, name in loops.items():
            words = [*words_of(where, "demo", model), "controller=l0_target", f"controller.target_l0={args.target:g}"]
            if not finished(where, name) and not args.table:
                train(where, name, [*words, "seed=0", *initial_strength(model, start)])
        points = []
        for number in range(NUM_CONSTANT):
            name = f"demo-{model}-constant{number}"
            if not finished(where, name) and not args.table:
                strength = last_of(where, loops[1.0])[2] * SPREAD ** (2 * number / (NUM_CONSTANT - 1) - 1)
                train(where, name, [*words_of(where, "demo", model), f"model.coefficient={strength:.4g}", "seed=0"])
            if finished(where, name):
                l0, fvu, strength = last_of(where, name)
                points.append((l0, fvu))
                print(f"| {model} | constant {strength:.4g} | {l0:.2f} | {fvu:.5f} | | |")
        for start, name in loops.items():
            if finished(where, name):
                l0, fvu, _ = last_of(where, name)
                at = interpolated(points, l0)
                print(
                    f"| {model} | l0_target, start x{start:g} | {l0:.2f} | {fvu:.5f} | {at:.5f} | {fvu / at - 1:+.2%} |"
                )


if __name__ == "__main__":
    main()
