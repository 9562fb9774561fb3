"""How well did a run keep to its trajectory of L0? From the run folder alone; the figures of docs/dynamics.md.

    python benchmarks/trajectory.py runs/dynamics-50m
    python benchmarks/trajectory.py runs/smollm2-l0 --shares 0.2 1

At each share of the budget the nearest validation beside the set point; over the last tenth the rms of
ln(measured / set point); how many means of the training batches' L0 over 1M samples (or a fiftieth of a shorter run)
are below the one before; from which share of the budget on L0 stays within 5% of the set point, in means over 1%.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from statistics import mean

from control.cells import parts_of

from sparsepilot.reporting.runs import Run, read_runs
from sparsepilot.run_folder import RunFolder


def print_run(run: Run, shares: list[float]) -> None:
    """The table of one run, and three lines below it."""
    budget, rows = run.budget_samples, run.rows
    steps = [row for row in rows if "controller/error" in row]
    validations = [row for row in rows if "val/l0" in row]
    print(
        "| share of the budget | set point | L0 of held-out rows | off by | FVU | silent latents |",
        "|---|" + "---|" * 5,
        sep="\n",
    )
    for share in shares:
        held_out = min(validations, key=lambda row: abs(row["samples"] - share * budget))
        step = min(steps, key=lambda row: abs(row["samples"] - held_out["samples"]))
        print(
            f"| {share:.4g} | {step['controller/target']:.4g} | {held_out['val/l0']:.4g} "
            f"| {held_out['val/l0'] / step['controller/target'] - 1:+.1%} | {held_out['val/fvu']:.3f} "
            f"| {held_out['val/silent_latents']:,} |"
        )
    last = [row["controller/error"] for row in steps if row["samples"] > 0.9 * budget]
    print()
    if last:  # the run has come so far
        print(f"rms of the error over the last tenth: {math.sqrt(mean(e * e for e in last)):.1%}")
    width = min(1e6, budget / 50)
    means = [mean(l0) for _, l0 in sorted(parts_of(rows, "train/l0", width).items())]
    falls = [b < a for a, b in pairwise(means)]
    print(f"means over {width:,.0f} samples that are below the one before: {sum(falls)} of {len(falls)}")
    errors = parts_of(steps, "controller/error", budget / 100)
    outside = [part for part, values in errors.items() if abs(mean(values)) > 0.05]
    print(f"within 5% for good from {(max(outside) + 1) / 100 if outside else 0:.0%} of the budget on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5, 1.0])
    args = parser.parse_args()
    for run in read_runs(RunFolder(args.run_dir)):
        print_run(run, args.shares)


if __name__ == "__main__":
    main()
