"""Does closed-loop control come back? Runs that are disturbed at half of the budget, and runs with another batch size.

    python benchmarks/control_disturbed.py --scratch /tmp/grid         # resumable
    python benchmarks/control_disturbed.py --scratch /tmp/grid --table

Demo cache, L0 32. Disturbances (callbacks.disturb): every threshold raised by 0.5, the strength times 100, the learning
rate times 3 for 1% of the run, all data times 1.5. Asked: L0 in means over 1% of the budget is back within 5% for good
inside 10% of the run. `farthest`: the largest |L0 / target - 1| of those means after the disturbance. L0 is what the
loop takes that of held-out rows to be, and `last`, of the last validation, says whether it was right; of a k, whose L0
in training is what was set, it is that of 50 validations.

Batches of 512 and 2048 on a given trajectory of the same samples: asked are the same L0 within 5% in means over 2% of
the budget.
"""

from __future__ import annotations

import argparse
import math
from statistics import geometric_mean, mean
from typing import Any

from control.cells import Where, judged_by, last_of, parts_of, rows_of, samples_of, there, validated, words_of

TARGET, AT = 32.0, 0.5
DISTURBANCES = {"thresholds": 0.5, "strength": 100, "lr": 3, "data_scale": 1.5}
WITH_THRESHOLDS = ("jumprelu", "jumprelu wide", "batchtopk", "matryoshka")
TRAJECTORY = "[[0.0,1000],[0.5,64],[0.8,32],[1.0,32]]"
"""From where these runs begin: one that begins lower has both arrive from above, in the same steps and not samples."""
LONGER = 4_915_200
"""Samples of the runs of two batch sizes: the trajectory is to need less than half the slew limit of the larger one."""


def back_after(rows: list[dict[str, Any]], model: str) -> tuple[float, float, bool]:
    """(share of the budget from the disturbance on after which L0 stays within 5%, farthest, all finite)."""
    steps = [row for row in rows if "controller/measured" in row]
    finite = all(math.isfinite(row["train/loss"]) for row in steps)
    budget = rows[-1]["samples"]
    after = [row for row in rows if row["samples"] > AT * budget]
    off = {part: mean(l0) / TARGET - 1 for part, l0 in parts_of(after, judged_by(model), budget / 100).items()}
    outside = [part for part, error in off.items() if abs(error) > 0.05]
    return (max(outside) + 1) / 100 - AT if outside else 0.0, max(map(abs, off.values())), finite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Where.arguments(parser)
    parser.add_argument("--models", nargs="+", default=["relu", "jumprelu"])
    parser.add_argument("--disturbances", nargs="*", default=list(DISTURBANCES), choices=list(DISTURBANCES))
    parser.add_argument("--no-batches", action="store_true", help="leave the two batch sizes out")
    parser.add_argument("--samples", type=int, help="of each disturbed run; the grid's where nothing is said")
    args = parser.parse_args()
    where = Where.of(args)
    print("| model | disturbance | back after | farthest | last | finite |", "|---|---|---|---|---|---|", sep="\n")
    for model in args.models:
        for what in args.disturbances:
            size = DISTURBANCES[what]
            if what == "thresholds" and model not in WITH_THRESHOLDS:
                continue
            name = f"demo-{model}-disturbed-{what}" + (f"-{args.samples}" if args.samples else "")
            words = [*words_of(where, "demo", model), "controller=l0_target", f"controller.target_l0={TARGET:g}"]
            words += [f"samples={args.samples}"] if args.samples else []
            words += validated(model, samples_of(words))
            words.append(f"callbacks.disturb={{at: {AT}, {what}: {size}}}")
            if there(where, name, words):
                share, farthest, finite = back_after(rows_of(where, name), model)
                last = last_of(where, name)["val/l0"] / TARGET - 1
                print(
                    f"| {model} | {what} {size:g} | {share:.0%} of the run | {farthest:.1%} | {last:+.1%} | {finite} |"
                )
    if args.no_batches:
        return
    print("", "| model | largest difference of L0, batch 512 against 2048 |", "|---|---|", sep="\n")
    for model in args.models:
        found = []
        for batch in (512, 2048):
            name = f"demo-{model}-batch{batch}"
            words = [*words_of(where, "demo", model), "controller=l0_target", f"controller.trajectory={TRAJECTORY}"]
            words += [f"samples={LONGER}", f"batch={batch}"]
            if there(where, name, words):
                parts = parts_of(rows_of(where, name), "train/l0", LONGER / 50)
                found.append({part: geometric_mean(l0) for part, l0 in parts.items()})
        if len(found) == 2:
            one, other = found
            apart = {part: abs(one[part] / other[part] - 1) for part in one.keys() & other.keys()}
            part = max(apart, key=lambda part: apart[part])
            print(f"| {model} | {apart[part]:.1%}, at {part / 50:.0%} of the budget |")


if __name__ == "__main__":
    main()
