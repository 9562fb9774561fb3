"""Kills training at named places with kill -9, goes on, and compares with a run that was never broken, bit for bit.

    nice -n 10 python benchmarks/kill_campaign.py                 # 100 kills, seed 0, about 15 minutes on 2 cores
    python benchmarks/kill_campaign.py --kills 10 --seed 1
    python benchmarks/kill_campaign.py --plant-bug last-fired     # must fail: exit status 1
    python benchmarks/kill_campaign.py --ranks 2 --trainer ddp_gloo    # two processes, of which one or all are killed

Each cell is a run folder that collects up to five kills, each of a real `train.py` process by its own SIGKILL at a
fault point (src/sparsepilot/faults.py and benchmarks/killing/targets.py), and is then finished. Half of the cells train
with two micro-batches per step and two threads; a third with TMPDIR on another filesystem. Every process after a
checkpoint must resume from it: it says so, and the wall-clock rows of earlier steps stay as they are. The finished
folder must equal the unbroken run: every leaf of the last checkpoint, the bytes of metrics.jsonl, sae.safetensors and
sae.json.

At the end every bug of benchmarks/killing/planted_bug.py (a number left out of the saved state) is planted in a cell of
its own, and must be found. `--out` keeps one JSON file a cell; started again, the campaign does the missing cells.
With --ranks each cell trains as so many processes, one thread each, started as torchrun would start them.
Exit status: 0 all equal, 1 a difference or a kill that did not happen as planned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `killing`, from wherever this is started

from killing.plan import POINTS, Cell, plan
from killing.planted_bug import BUGS
from killing.ranks import Ranks
from killing.runs import BATCH, REPOSITORY, Launch, RunUnderTest, launch

from sparsepilot.callbacks.checkpoint_io import list_checkpoints

Result = dict[str, Any]
MEMORY_DISK = Path("/dev/shm")
KILLS_WITH_A_BUG = 3
VARIANTS = (1, 2)
"""micro-batches per step, and threads of torch"""


def make_references(out: Path, launcher: Launch) -> None:
    """The cache and one unbroken run of each variant."""
    for accumulate in VARIANTS:
        threads, folder = _threads(launcher, accumulate), _reference(out, accumulate)
        run = RunUnderTest(folder, out / "cache", accumulate, launcher=launcher, threads=threads)
        if not (run.folder / "summary.json").exists():
            shutil.rmtree(run.folder, ignore_errors=True)
            ended = run.start()
            if ended.code != 0:
                raise SystemExit(f"the unbroken run ended with {ended.code}:\n{ended.out}")


def run_cell(out: Path, cell: Cell, launcher: Launch) -> Result:
    """Does a cell, or reads its result where it was done before."""
    file = out / "cells" / f"{cell.name}.json"
    planned = json.loads(json.dumps(asdict(cell)))
    if file.exists() and (done := json.loads(file.read_text(encoding="utf-8")))["cell"] == planned:
        return dict(done)
    folder = out / "runs" / cell.name
    shutil.rmtree(folder, ignore_errors=True)  # a cell that an earlier campaign did not finish
    variant, reference = cell.accumulate, _reference(out, cell.accumulate)
    run = RunUnderTest(folder, out / "cache", variant, reference, launcher, cell.bug, _threads(launcher, variant))
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if cell.other_tmpdir else None) as temporary:
        environment = {"TMPDIR": temporary}
        kills = [run.kill(kill, Path(temporary) / "fault.log", environment) for kill in cell.kills]
        end = run.finish(environment)
        crosses = os.stat(temporary).st_dev != os.stat(folder).st_dev
    result = {
        "cell": planned,
        "tmpdir_on_other_filesystem": crosses,
        "kills": kills,
        "end": end,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary_file = file.with_suffix(".tmp")
    temporary_file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    temporary_file.replace(file)
    return result


def faults_of(result: Result) -> list[str]:
    """All that went wrong in a cell."""
    problems = [problem for kill in result["kills"] for problem in kill["problems"]]
    return [*problems, *result["end"]["problems"], *result["end"]["differences"]]


def table(results: list[Result]) -> str:
    """Where the kills fell, a line for each place."""
    lines = [f"{'family':<11} {'point':<20} {'kills':>5} {'accumulate 2':>12} {'other TMPDIR':>12} {'samples':>18}"]
    kills = [(kill, result) for result in results for kill in result["kills"]]
    for family in dict.fromkeys(kill["family"] for kill, _ in sorted(kills, key=_place)):
        for point in dict.fromkeys((*POINTS.get(family, ()), "checkpoint-shard", *POINTS["timing"])):
            here = [(k, r) for k, r in kills if (k["family"], k["point"]) == (family, point)]
            if here:
                steps = [k["last_row_step"] for k, _ in here]
                span = f"{min(steps) * BATCH:,} - {max(steps) * BATCH:,}"
                doubled = sum(r["cell"]["accumulate"] == 2 for _, r in here)
                crossing = sum(r["tmpdir_on_other_filesystem"] for _, r in here)
                lines.append(f"{family:<11} {point:<20} {len(here):>5} {doubled:>12} {crossing:>12} {span:>18}")
    totals = Counter(kill["family"] for kill, _ in kills)
    after = sum(kill["family"] == "mid-step" and kill["had_checkpoint"] for kill, _ in kills)
    torn = sum("metrics.jsonl" in kill["torn"] for kill, _ in kills)
    half = sum(kill["checkpoint_tmp_bytes"] > 0 for kill, _ in kills)
    lines.append(f"{len(kills)} kills: " + ", ".join(f"{number} {family}" for family, number in totals.items()))
    if any(kill["rank"] is not None for kill, _ in kills):
        lines.append(f"{sum(kill['died'] > 1 for kill, _ in kills)} killed all ranks, the others one of them")
    lines.append(f"{after} mid-step after the first checkpoint")
    lines.append(f"{torn} left a torn line in metrics.jsonl, {half} a checkpoint that was not renamed")
    return "\n".join(lines)


def main() -> int:
    """Runs the campaign and says how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=None, help="100; 3 with --plant-bug")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--trainer", default="ddp_gloo", help="of several ranks")
    parser.add_argument("--out", type=Path, default=None, help="runs/kill_campaign; of several ranks, one of their own")
    parser.add_argument("--plant-bug", choices=sorted(BUGS), default=None)
    args = parser.parse_args()
    if args.out is None:
        args.out = REPOSITORY / "runs" / ("kill_campaign" + (f"-{args.trainer}-{args.ranks}" if args.ranks > 1 else ""))
    args.out.mkdir(parents=True, exist_ok=True)
    launcher = launch if args.ranks == 1 else Ranks(args.ranks, args.trainer)
    began_s = time.monotonic()
    make_references(args.out, launcher)
    results, failed = [], False
    num_kills = args.kills or (KILLS_WITH_A_BUG if args.plant_bug else 100)
    for cell in plan(num_kills, args.seed, args.plant_bug, args.ranks, _sharded(args)):
        result = run_cell(args.out, cell, launcher)
        results.append(result)
        wrong = faults_of(result)
        failed |= bool(wrong)
        verdict = f"{len(wrong)} things wrong; first: {wrong[0]}" if wrong else "equal, bit for bit"
        print(f"{cell.name}  {len(result['kills'])} kills  {result['seconds']:5.1f} s  {verdict}", flush=True)
    print("\n" + table(results))
    missed = [] if args.plant_bug else _bugs_missed(args, launcher)
    cells_s = sum(result["seconds"] for result in results)
    print(f"{cells_s:,.0f} s for these cells, {time.monotonic() - began_s:,.0f} s this time with all else")
    print("FAILED" if failed or missed else "PASSED: every folder equals the unbroken run")
    return int(failed or bool(missed))


def _bugs_missed(args: argparse.Namespace, launcher: Launch) -> list[str]:
    missed = []
    for bug in BUGS:
        planned = plan(KILLS_WITH_A_BUG, args.seed, bug, args.ranks, _sharded(args))
        cells = [run_cell(args.out, cell, launcher) for cell in planned]
        problems = [p for c in cells for kill in c["kills"] for p in kill["problems"]] + cells[0]["end"]["problems"]
        differences = [line for cell in cells for line in cell["end"]["differences"]]
        if problems or not differences:  # it must be found by comparing, not because the run broke
            missed.append(bug)
        found = f"found: {len(differences)} differences, such as {differences[0]}" if differences else "NOT FOUND"
        print(f"planted bug {bug!r}: {found}" + (f"; but {problems[0]}" if problems else ""), flush=True)
    return missed


def _sharded(args: argparse.Namespace) -> bool:
    """Whether every rank writes its part of a checkpoint, as the unbroken run's shows."""
    return list_checkpoints(_reference(args.out, 1) / "checkpoints")[0][1].is_dir()


def _threads(launcher: Launch, accumulate: int) -> int:
    return 1 if isinstance(launcher, Ranks) else accumulate


def _reference(out: Path, accumulate: int) -> Path:
    return out / f"unbroken-accumulate-{accumulate}"


def _place(item: tuple[Result, Result]) -> int:
    return list(POINTS).index(item[0]["family"])


if __name__ == "__main__":
    sys.exit(main())
