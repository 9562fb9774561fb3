"""Does closed-loop control come back? Runs that are disturbed at half of the budget, and runs with another batch size.

    python benchmarks/control_disturbed.py --scratch /tmp/grid         # resumable
    python benchmarks/control_disturbed.py --scratch /tmp/grid --table

Demo cache, L0 32. Disturbances (callbacks.disturb): every threshold raised by 0.5, the strength times 100, the learning
rate times 3 for 1% of the run, all data times 1.5. Asked: L0 in means over 1% of the budget is back within 5% for good
inside 10% of the run. `farthest`: the largest |L0 / target - 1| of those means after the disturbance.

Batches of 512 and 2048 on a given trajectory of the same samples: asked are the same L0 within 5% in means over 2% of
the budget.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from control.cells import Where, rows_of, there, words_of

TARGET, AT = 32.0, 0.5
DISTURBANCES = {"thresholds": 0.5, "strength": 100, "lr": 3, "data_scale": 1.5}
TRAJECTORY = "[[0.0,1000],[0.5,64],[0.8,32],[1.0,32]]"
"""From where these runs begin: one that begins lower has both arrive from above, in the same steps and not samples."""
LONGER = 4_915_200
"""Samples of the runs of two batch sizes: the trajectory is to need less than half the slew limit of the larger one."""


def means_of(rows: list[dict[str, Any]], parts: int) -> dict[int, float]:
    """Mean ln L0 of the training batches in each of `parts` equal parts of the budget."""
    budget, found = rows[-1]["samples"], {}
    for row in rows:
        if "train/l0" in row:
            found.setdefault(min(parts - 1, int(parts * row["samples"] / budget)), []).append(math.log(row["train/l0"]))
    return {part: sum(values) / len(values) for part, values in found.items()}


def back_after(rows: list[dict[str, Any]]) -> tuple[float, float, bool]:
    """(share of the budget from the disturbance on after which L0 stays within 5%, farthest, all finite)."""
    steps = [row for row in rows if "controller/measured" in row]
    finite = all(math.isfinite(row["train/loss"]) for row in steps)
    errors: dict[int, list[float]] = {}
    for row in steps:
        if row["samples"] > AT * rows[-1]["samples"]:
            errors.setdefault(int(100 * row["samples"] / rows[-1]["samples"]), []).append(row["controller/measured"])
    off = {part: sum(values) / len(values) / TARGET - 1 for part, values in errors.items()}
    outside = [part for part, error in off.items() if abs(error) > 0.05]
    return (max(outside) + 1) / 100 - AT if outside else 0.0, max(map(abs, off.values())), finite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Where.arguments(parser)
    parser.add_argument("--models", nargs="+", default=["relu", "jumprelu"])
    args = parser.parse_args()
    where = Where.of(args)
    print("| model | disturbance | back after | farthest | finite |", "|---|---|---|---|---|", sep="\n")
    for model in args.models:
        for what, size in DISTURBANCES.items():
            if what == "thresholds" and not model.startswith("jumprelu"):
                continue  # a ReLU has none
            name = f"demo-{model}-disturbed-{what}"
            words = [*words_of(where, "demo", model), "controller=l0_target", f"controller.target_l0={TARGET:g}"]
            words.append(f"callbacks.disturb={{at: {AT}, {what}: {size}}}")
            if there(where, name, words):
                share, farthest, finite = back_after(rows_of(where, name))
                print(f"| {model} | {what} {size:g} | {share:.0%} of the run | {farthest:.1%} | {finite} |")
    print("", "| model | largest difference of L0, batch 512 against 2048 |", "|---|---|", sep="\n")
    for model in args.models:
        found = []
        for batch in (512, 2048):
            name = f"demo-{model}-batch{batch}"
            words = [*words_of(where, "demo", model), "controller=l0_target", f"controller.trajectory={TRAJECTORY}"]
            words += [f"samples={LONGER}", f"batch={batch}"]
            if there(where, name, words):
                found.append(means_of(rows_of(where, name), 50))
        if len(found) == 2:
            one, other = found
            apart = {part: abs(math.expm1(one[part] - other[part])) for part in one.keys() & other.keys()}
            part = max(apart, key=lambda part: apart[part])
            print(f"| {model} | {apart[part]:.1%}, at {part / 50:.0%} of the budget |")


if __name__ == "__main__":
    main()
