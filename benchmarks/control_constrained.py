"""Is `constrained` as sparse as its quality allows? Three seeds beside a frontier of separate constant runs.

    python benchmarks/control_constrained.py --scratch /tmp/grid       # resumable
    python benchmarks/control_constrained.py --scratch /tmp/grid --table
    python benchmarks/control_constrained.py --scratch /tmp/grid --model relu --samples 4915200 --target 0.13

Demo cache, `controller=constrained controller.quality=fvu`. Asked, of the last third of the run: the
mean quality within 1% below the target or within 2 standard errors of it (the error of a mean of batches, from the
spread of means over 1% of the budget), the strength off its clamps; at the end an L0 at most 10% above that of the
frontier of constant coefficients at the same FVU on held-out rows.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean, stdev

from control.cells import Where, interpolated, last_of, rows_of, there, words_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Where.arguments(parser)
    parser.add_argument("--model", default="jumprelu")
    parser.add_argument("--target", type=float, default=0.15, help="FVU of training")
    parser.add_argument("--coefficients", nargs="+", type=float, default=[0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--samples", type=int, help="of each run; the grid's where nothing is said")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    where = Where.of(args)
    base, points, run = words_of(where, "demo", args.model), [], f"demo-{args.model}"
    if args.samples:
        base, run = [*base, f"samples={args.samples}"], f"{run}-{args.samples}"
    print("| run | L0 | FVU, held out |", "|---|---|---|", sep="\n")
    for coefficient in args.coefficients:
        name = f"{run}-coefficient{coefficient:g}".replace(".", "_")
        words = [*base, f"model.coefficient={coefficient}"]
        if there(where, name, words):
            last = last_of(where, name)
            points.append((last["val/fvu"], last["val/l0"]))
            print(f"| constant {coefficient:g} | {last['val/l0']:.2f} | {last['val/fvu']:.5f} |")
    print(
        "", "| seed | quality, last third | its SE | L0 | FVU, held out | frontier's L0 there | more | at a clamp |",
        "|---|---|---|---|---|---|---|---|", sep="\n",
    )  # fmt: skip
    for seed in args.seeds:
        name = f"{run}-constrained{args.target:g}-seed{seed}".replace(".", "_")
        words = [*base, "controller=constrained", "controller.quality=fvu", f"controller.target={args.target:g}"]
        words.append(f"seed={seed}")
        if not there(where, name, words):
            continue
        rows = rows_of(where, name)
        late = [row for row in rows if "train/fvu" in row and row["samples"] > 2 / 3 * rows[-1]["samples"]]
        parts: dict[int, list[float]] = {}
        for row in late:
            parts.setdefault(int(100 * row["samples"] / rows[-1]["samples"]), []).append(row["train/fvu"])
        means = [mean(values) for values in parts.values()]
        quality, error = mean(row["train/fvu"] for row in late), stdev(means) / math.sqrt(len(means))
        last = last_of(where, name)
        frontier = interpolated(points, last["val/fvu"])
        print(
            f"| {seed} | {quality:.5f} ({quality / args.target - 1:+.2%}) | {error:.5f} | {last['val/l0']:.2f} "
            f"| {last['val/fvu']:.5f} | {frontier:.2f} | {last['val/l0'] / frontier - 1:+.1%} "
            f"| {sum(row['controller/at_limit'] for row in late):.0f} rows |"
        )


if __name__ == "__main__":
    main()
