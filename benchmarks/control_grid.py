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
    lowest       the smoothed L0's minimum as a share of the target; asked: 80%

The planted data are this project's, at 256 dimensions, 512 features, 16 of them active; the demo's are the README's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from peers.common import write_json

from sparsepilot.controllers.l0_loop import BEGIN
from sparsepilot.reporting.environment import environment
from sparsepilot.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "relu": ["model=relu"],
    "relu tanh": ["model=relu", "model.penalty=tanh"],
    "jumprelu": ["model=jumprelu"],
    "jumprelu wide": ["model=jumprelu", "model.recipe=tanh"],
    "gated": ["model=gated"],
    "batchtopk": ["model=batchtopk"],
    "matryoshka": ["model=matryoshka"],
}
PENALTIES = ("relu", "relu tanh", "jumprelu", "jumprelu wide", "gated")
DATA = {
    "planted": [
        "data=synthetic", "data.path={scratch}/planted", "data.build.d_in=256", "data.build.num_features=512",
        "data.build.mean_active=16", "data.build.noise=0.1", "model.d_sae=512", "samples=1_536_000", "batch=512",
        "optimizer.lr=2e-3",
    ],
    "demo": ["data.path={cache}", "model.d_sae=2048", "samples=1_228_800", "batch=512", "optimizer.lr=1e-3"],
}  # fmt: skip
ASKED = {"l0_error": 0.02, "rms": 0.04, "settled": 0.4, "lowest": 0.8}


def judge(rows: Sequence[dict[str, Any]], target: float) -> dict[str, float]:
    """The figures of a cell from the rows of its run."""
    budget = rows[-1]["samples"]
    steps = [row for row in rows if "controller/measured" in row]
    last = [math.log(row["controller/measured"] / target) for row in steps if row["samples"] > 0.9 * budget]
    reached = next(row["samples"] for row in steps if row["controller/target"] <= target * 1.01) / budget
    means: dict[int, list[float]] = {}
    for row in steps:
        means.setdefault(int(100 * row["samples"] / budget), []).append(row["controller/measured"])
    off = [
        share for share, l0 in means.items()
        if share >= 100 * reached and abs(math.log(sum(l0) / len(l0) / target)) > 0.05
    ]  # fmt: skip
    validations = [row for row in rows if "val/l0" in row]
    return {
        "l0": validations[-1]["val/l0"],
        "l0_error": validations[-1]["val/l0"] / target - 1,
        "rms": math.sqrt(sum(e * e for e in last) / len(last)),
        "reached": reached,
        "settled": max(0.0, (max(off) + 1) / 100 - reached) if off else 0.0,
        "lowest": min(row["controller/measured"] for row in steps) / target,
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


def initial_strength(model: str, start: float) -> list[str]:
    """The override that makes a penalty begin at `start` times its default strength."""
    if model not in PENALTIES or start == 1.0:
        return []
    node = OmegaConf.load(ROOT / "conf" / "model" / f"{model.split()[0]}.yaml")
    return [f"controller.initial_strength={start * BEGIN * node['coefficient']:.4g}"]


def run_cell(args: argparse.Namespace, data: str, model: str, target: float, start: float, out: Path) -> None:
    run_dir = out.with_suffix("")
    overrides = [word.format(scratch=args.scratch, cache=args.cache) for word in DATA[data]]
    words = [
        *overrides, *MODELS[model], "controller=l0_target", f"controller.target_l0={target:g}", f"seed={args.seed}",
        *initial_strength(model, start), "logger=none", "report=false", f"threads={args.threads}",
        "callbacks.log_every_steps=1", f"run_dir={run_dir}",
    ]  # fmt: skip
    began_s = time.perf_counter()
    with out.with_suffix(".txt").open("w", encoding="utf-8") as file:
        quiet = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, str(ROOT / "train.py"), *words]
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=quiet, check=True)
    result = judge(list(read_rows(run_dir / "metrics.jsonl")), target)
    about = {"data": data, "model": model, "target": target, "start": start, "seed": args.seed, "command": words}
    write_json(out, {**about, **result, "wall_s": time.perf_counter() - began_s, "environment": environment()})


def cells(args: argparse.Namespace) -> list[tuple[str, str, float, float]]:
    """What is to be run: the starts concern penalties alone."""
    every = product(args.data, args.models, args.targets, args.starts)
    return [cell for cell in every if cell[3] == 1.0 or cell[1] in PENALTIES]


def path_of(args: argparse.Namespace, cell: tuple[str, str, float, float]) -> Path:
    data, model, target, start = cell
    return Path(args.scratch / f"{data}-{model.replace(' ', '-')}-{target:g}-start{start:g}-seed{args.seed}.json")


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
    return "\n".join([*lines, "", f"{sum(map(passes, found))} of {len(found)} meet all; worst " + "; ".join(named)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=ROOT / "cache" / "demo")
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--targets", nargs="+", type=float, default=[8.0, 32.0, 128.0])
    parser.add_argument("--starts", nargs="+", type=float, default=[1.0, 100.0, 0.01])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hold", type=Path, default=None, help="no run begins while this file exists")
    parser.add_argument("--table", action="store_true", help="the table of what is there")
    args = parser.parse_args()
    args.scratch = args.scratch.resolve()
    args.scratch.mkdir(parents=True, exist_ok=True)
    found = []
    for cell in cells(args):
        out = path_of(args, cell)
        while args.hold and args.hold.exists():
            time.sleep(2)
        if not out.exists() and not args.table:
            run_cell(args, *cell, out)
            print(table([json.loads(out.read_text(encoding="utf-8"))]).splitlines()[2], file=sys.stderr, flush=True)
        if out.exists():
            found.append(json.loads(out.read_text(encoding="utf-8")))
    print(table(found) if found else "nothing there")


if __name__ == "__main__":
    main()
