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

from control.cells import Where, initial_strength, interpolated, last_of, rows_of, there, words_of

NUM_CONSTANT, SPREAD = 8, 2.0
"""Coefficients from 1 / SPREAD to SPREAD times the strength that the loop ended with, in equal ratios."""


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
        target = ["controller=l0_target", f"controller.target_l0={args.target:g}", "seed=0"]
        base, made = words_of(where, "demo", model), []
        for start, name in loops.items():
            if there(where, name, base + target + initial_strength(model, start)):
                made.append(start)
        if 1.0 not in made:
            continue
        found = [row["controller/strength"] for row in rows_of(where, loops[1.0]) if "controller/strength" in row][-1]
        points = []
        for number in range(NUM_CONSTANT):
            strength = found * SPREAD ** (2 * number / (NUM_CONSTANT - 1) - 1)
            name = f"demo-{model}-constant{number}"
            if there(where, name, [*base, f"model.coefficient={strength:.4g}", "seed=0"]):
                last = last_of(where, name)
                points.append((last["val/l0"], last["val/fvu"]))
                print(f"| {model} | constant {strength:.4g} | {last['val/l0']:.2f} | {last['val/fvu']:.5f} | | |")
        for start in made:
            last = last_of(where, loops[start])
            l0, fvu = last["val/l0"], last["val/fvu"]
            at = interpolated(points, l0)
            print(f"| {model} | l0_target, start x{start:g} | {l0:.2f} | {fvu:.5f} | {at:.5f} | {fvu / at - 1:+.2%} |")


if __name__ == "__main__":
    main()
