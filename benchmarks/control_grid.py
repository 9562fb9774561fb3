"""Does closed-loop control arrive? A grid: architectures x targets x data x wrong starts, one run and one JSON a cell.

    python benchmarks/control_grid.py --scratch /tmp/grid                          # everything, resumable
    python benchmarks/control_grid.py --scratch /tmp/grid --data planted --targets 8
    python benchmarks/control_grid.py --scratch /tmp/grid --table                  # runs nothing

Every cell runs `train.py controller=l0_target` with the gains of conf/controller/shared/loop.yaml and nothing of the
controller set but the target and, for penalties, a start strength that is `--starts` times its default. A cell's row:

    L0 error     of the last validation against the target; asked: 2%
    RMS          of the measured L0 against the target over the last tenth of the run; asked: 4%
    settled      share of the budget, after the set point reached the target, from which on the error stays within 5%
                 in means over 1% of the budget; asked: 40%
    lowest       the smoothed L0's minimum, once it has been there, as a share of the target; asked: 80%

The measured L0 is the loop's own reckoning of that of held-out rows; of a k, whose L0 in training is what was set, it
is what 50 validations found.

control/cells.py has the data and their settings.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import dropwhile, product
from pathlib import Path
from statistics import mean
from typing import Any

from control.cells import (
    DATA,
    MODELS,
    PENALTIES,
    Where,
    initial_strength,
    judged_by,
    parts_of,
    rows_of,
    samples_of,
    train,
    validated,
    words_of,
)
from peers.common import write_json

from sparsepilot.reporting.environment import environment

ASKED = {"l0_error": 0.02, "rms": 0.04, "settled": 0.4, "lowest": 0.8}


def judge(rows: Sequence[dict[str, Any]], target: float, model: str) -> dict[str, float]:
    """The figures of a cell from the rows of its run."""
    l0 = judged_by(model)
    budget = rows[-1]["samples"]
    steps = [row for row in rows if "controller/measured" in row]
    found = [row for row in rows if l0 in row]
    last = [math.log(row[l0] / target) for row in found if row["samples"] > 0.9 * budget]
    reached = next(row["samples"] for row in steps if row["controller/target"] <= target * 1.01) / budget
    means = {part: mean(values) for part, values in parts_of(found, l0, budget / 100).items()}
    off = [part for part, mean_l0 in means.items() if part >= 100 * reached and abs(math.log(mean_l0 / target)) > 0.05]
    validations = [row for row in rows if "val/l0" in row]
    return {
        "l0": validations[-1]["val/l0"],
        "l0_error": validations[-1]["val/l0"] / target - 1,
        "rms": math.sqrt(sum(e * e for e in last) / len(last)),
        "reached": reached,
        "settled": max(0.0, (max(off) + 1) / 100 - reached) if off else 0.0,
        "lowest": min((row[l0] for row in dropwhile(lambda row: row[l0] < 0.95 * target, found)), default=0.0) / target,
        "fvu": validations[-1]["val/fvu"],
        "dead_latents": steps[-1]["train/dead_latents"],
        "strength": steps[-1]["controller/strength"],
    }


def passes(cell: dict[str, Any]) -> bool:
    """Whether a cell meets all that is asked."""
    return (
        abs(cell["l0_error"]) <= ASKED["l0_error"]
        and cell["rms"] <= ASKED["rms"]
        and cell["settled"] <= ASKED["settled"]
        and cell["lowest"] >= ASKED["lowest"]
    )


def run_cell(where: Where, seed: int, data: str, model: str, target: float, start: float, out: Path) -> None:
    words = [
        *words_of(where, data, model), "controller=l0_target", f"controller.target_l0={target:g}", f"seed={seed}",
        *initial_strength(model, start),
    ]  # fmt: skip
    words += validated(model, samples_of(words))
    made_by = environment()  # before the run: the tree may have another commit when it ends
    seconds = train(where, out.stem, words)
    about = {"data": data, "model": model, "target": target, "start": start, "seed": seed, "command": words}
    result = judge(rows_of(where, out.stem), target, model)
    write_json(out, {**about, **result, "wall_s": seconds, "environment": made_by})


def cells(args: argparse.Namespace) -> list[tuple[str, str, float, float]]:
    """What is to be run: the starts concern penalties alone."""
    every = product(args.data, args.models, args.targets, args.starts)
    return [cell for cell in every if cell[3] == 1.0 or cell[1] in PENALTIES]


def name_of(cell: tuple[str, str, float, float], seed: int) -> str:
    data, model, target, start = cell
    return f"{data}-{model.replace(' ', '-')}-{target:g}-start{start:g}-seed{seed}"


def table(found: list[dict[str, Any]]) -> str:
    """Every cell, the failing ones marked, and the worst figure of each column."""
    lines = ["| data | model | target | start x | L0 | error | RMS | settled | lowest | FVU | |", "|" + "---|" * 11]
    lines += [
        f"| {c['data']} | {c['model']} | {c['target']:g} | {c['start']:g} | {c['l0']:.2f} | {c['l0_error']:+.1%} "
        f"| {c['rms']:.1%} | {c['settled']:.0%} | {c['lowest']:.0%} | {c['fvu']:.4f} "
        f"| {'' if passes(c) else 'misses'} |"
        for c in found
    ]
    worst = {
        "error": max(found, key=lambda c: abs(c["l0_error"])),
        "RMS": max(found, key=lambda c: c["rms"]),
        "settled": max(found, key=lambda c: c["settled"]),
        "lowest": min(found, key=lambda c: c["lowest"]),
    }
    named = (f"{what}: {c['data']} {c['model']} {c['target']:g} x{c['start']:g}" for what, c in worst.items())
    commits = sorted({str(c["environment"]["git_commit"])[:7] for c in found})  # a cell that is there is not run again
    verdict = f"{sum(map(passes, found))} of {len(found)} meet all; worst " + "; ".join(named)
    return "\n".join([*lines, "", verdict, f"commits: {', '.join(commits)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Where.arguments(parser)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--targets", nargs="+", type=float, default=[8.0, 32.0, 128.0])
    parser.add_argument("--starts", nargs="+", type=float, default=[1.0, 100.0, 0.01])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    where = Where.of(args)
    found = []
    for cell in cells(args):
        out = where.scratch / f"{name_of(cell, args.seed)}.json"
        if not out.exists() and not args.table:
            run_cell(where, args.seed, *cell, out)
            print(table([json.loads(out.read_text(encoding="utf-8"))]).splitlines()[2], file=sys.stderr, flush=True)
        if out.exists():
            found.append(json.loads(out.read_text(encoding="utf-8")))
    print(table(found) if found else "nothing there")


if __name__ == "__main__":
    main()
