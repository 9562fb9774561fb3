"""FVU at equal L0 of this project's architectures beside sae-lens's and dictionary-learning's, on the demo cache.

    python benchmarks/compare_quality.py --scratch /tmp/quality --peers-python .venv-peers/bin/python   # everything
    python benchmarks/compare_quality.py --scratch /tmp/quality --tools sparsepilot 'sparsepilot, decaying'  # ours
    python benchmarks/compare_quality.py --scratch /tmp/quality --architectures relu gated              # a part of it
    python benchmarks/compare_quality.py --scratch /tmp/quality --table                                 # trains nothing

How the peers' environment is made stands in `benchmarks/peers/*.py`, and so does what each tool is trained with: its
own normalisation, initialisation, losses and schedule. Ours is `train.py` as a user runs it. All see the same rows in
the same batches: the loader's order, written once per seed into `--scratch` (half a gigabyte each). One evaluator
measures all on raw validation activations (`benchmarks/peers/common.py`), with the codes of each tool's inference.

Every tool is trained at the same learning rates with the first seed; while its best stands at the edge of what was
tried, one more step outwards is tried, at most `--outwards` of them. The best one is repeated with the other seeds.

Equal L0 is `--l0`. Each architecture has a knob (KNOBS): k, a target, or the coefficient of its penalty. At the first
learning rate a search moves the knob, at most `--knobs` trainings, until two of them bracket the L0, not further than
a factor of 1.5 apart, or one hits it (within 1%; 3% for k). FVU at the L0 is linear between the nearest on either side,
log FVU over log L0; so is the knob. At the next rates the search begins at that knob, and one training within 10% of
the L0 is enough, moved along the near rate's line; the best rate's search is then finished as the first one's. The
other seeds are trained once, at the knob found, and moved along the first seed's line. Where nothing brackets the L0
but two trainings exist, their line goes on for at most 20% in L0; else the value is the nearest one's and marked.

Each training is one JSON file under `--scratch`; what is there is not run again, so an interrupted campaign goes on.
Trainings of several campaigns with one `--scratch` take turns. While the file `--hold` exists none begins.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from peers.common import Rows, evaluate, write_json
from rich.console import Console

import sparsepilot
from sparsepilot.building import build_data
from sparsepilot.config.resolvers import register_resolvers
from sparsepilot.config.schema import register
from sparsepilot.data.cache import Cache

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"sae-lens": "train_sae_lens.py", "dictionary-learning": "train_dictionary_learning.py"}
OURS = {"sparsepilot": "", "sparsepilot, decaying": "schedule=warmup_stable_decay"}
PHASES = (("batchtopk", "topk", "jumprelu", "relu"), ("matryoshka", "gated"))  # the second begins after the first
BRACKET = 1.5  # two L0 with the wanted one between them, no further apart than this
CLOSE = 0.01  # an L0 that counts as the wanted one
REACH = 1.2  # how far a line may be followed beyond what was measured
NEAR = 1.1  # how far the line of another learning rate may be followed


@dataclass(frozen=True)
class Knob:
    """What moves the L0 of one architecture of one tool."""

    name: str
    start: float | None  # None: what our configuration has as default
    rises: bool  # whether L0 rises with it
    hit: float = CLOSE  # relative error of L0 that ends the search
    whole: bool = False  # takes whole numbers only

    def near(self, value: float) -> float:
        """A value as it is used and written into file names."""
        return float(round(value)) if self.whole else float(f"{value:.3g}")


def k_of(name: str) -> Knob:
    return Knob(name, 32, rises=True, hit=0.03, whole=True)


KNOBS: dict[str, dict[str, Knob]] = {
    "sae-lens": {
        **{name: k_of("k") for name in ("topk", "batchtopk", "matryoshka")},
        "relu": Knob("l1_coefficient", 5.0, rises=False),  # 5 in its guide
        "gated": Knob("l1_coefficient", 5.0, rises=False),
        "jumprelu": Knob("l0_coefficient", 0.35, rises=False),
    },
    "dictionary-learning": {
        **{name: k_of("k") for name in ("topk", "batchtopk", "matryoshka")},
        "relu": Knob("l1_penalty", 0.08, rises=False),  # 0.012 to 0.06 in its demo
        "gated": Knob("l1_penalty", 0.03, rises=False),  # 0.012 to 0.08 in its demo
        "jumprelu": Knob("target_l0", 32, rises=True),
    },
    **{
        name: {
            **{name: k_of("model.k") for name in ("topk", "batchtopk", "matryoshka")},
            **{name: Knob("model.coefficient", None, rises=False) for name in ("relu", "gated", "jumprelu")},
        }
        for name in OURS
    },
}

# ------------------------------------------------------------------------------------------- from cells to FVU at an L0


class Point(NamedTuple):
    """One training: where its knob stood, the L0 and the FVU that came out."""

    knob: float
    l0: float
    fvu: float


class AtL0(NamedTuple):
    """What several points say about one L0."""

    knob: float
    fvu: float
    slopes: tuple[float, float] | None  # d log knob and d log FVU by d log L0
    how: str  # "measured", "between", "moved", "beyond" or "off"


def along(point: Point, slopes: tuple[float, float], l0: float, how: str) -> AtL0:
    """A point moved to an L0 along a line, all in logarithms."""
    ratio = l0 / point.l0
    return AtL0(point.knob * ratio ** slopes[0], point.fvu * ratio ** slopes[1], slopes, how)


def through(a: Point, b: Point) -> tuple[float, float]:
    """The slopes of the line through two points."""
    by = math.log(b.l0 / a.l0)
    return math.log(b.knob / a.knob) / by, math.log(b.fvu / a.fvu) / by


def nearest(points: list[Point], l0: float) -> list[Point]:
    return sorted(points, key=lambda p: abs(math.log(p.l0 / l0)))


def bracket(points: list[Point], l0: float) -> tuple[Point, Point] | None:
    """The nearest point on each side."""
    below = [p for p in nearest(points, l0) if p.l0 <= l0]
    above = [p for p in nearest(points, l0) if p.l0 > l0]
    return (below[0], above[0]) if below and above else None


def at_l0(points: list[Point], l0: float, hit: float) -> AtL0 | None:
    """The rule of the module's docstring; None without points."""
    points = [p for p in points if p.l0 > 0 and math.isfinite(p.fvu)]
    if not points:
        return None
    if pair := bracket(points, l0):
        return along(pair[0], through(*pair), l0, "between")
    best, *others = nearest(points, l0)
    off = abs(math.log(best.l0 / l0))
    if others and others[0].l0 != best.l0 and off < math.log(REACH):
        return along(best, through(best, others[0]), l0, "beyond")
    return AtL0(best.knob, best.fvu, None, "measured" if off <= hit else "off")


def next_knob(points: list[Point], l0: float, knob: Knob) -> float | None:
    """Where the search looks next, or None where it ends."""
    points = [p for p in points if p.l0 > 0 and math.isfinite(p.fvu)]
    if not points:
        return None
    if abs(math.log(nearest(points, l0)[0].l0 / l0)) <= knob.hit:
        return None
    pair = bracket(points, l0)
    if pair and pair[1].l0 / pair[0].l0 <= BRACKET:
        return None
    if pair:
        wanted = along(pair[0], through(*pair), l0, "between").knob
    else:
        best, *others = nearest(points, l0)
        power = 1.0 if knob.rises else -1.0  # d log L0 / d log knob, as a first guess
        if others:
            measured = math.log(best.l0 / others[0].l0) / math.log(best.knob / others[0].knob)
            if measured * power > 0:
                power = math.copysign(min(max(abs(measured), 0.4), 4.0), power)
        step = math.log(l0 / best.l0)
        step += math.copysign(0.05, step)  # a little further, so that the two bracket it
        wanted = best.knob * math.exp(min(max(step / power, -3.0), 3.0))
    wanted = knob.near(wanted)
    return None if any(p.knob == wanted for p in points) else wanted


def best_rate(found: dict[float, AtL0]) -> float:
    """The learning rate with the lowest FVU, of those that came to the L0 (of all, where none did)."""
    came = {lr: at for lr, at in found.items() if at.how != "off"} or found
    return min(came, key=lambda lr: came[lr].fvu)


# ------------------------------------------------------------------------------------------- the campaign


class Campaign:
    """Where things lie, what every training has in common, and the trainings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scratch: Path = args.scratch.resolve()
        self.cache = Cache(args.cache, [args.site])
        self.dtype = "float32" if self.cache.dtype == "int8" else self.cache.dtype  # int8 rows come decoded
        self.settings = {
            "cache": self.cache.fingerprint,
            "site": args.site,
            "samples": args.samples // args.batch * args.batch,
            "batch": args.batch,
            "d_in": self.cache.widths[args.site],
            "d_sae": args.d_sae,
            "threads": args.threads,
        }
        self.train_now = not args.table
        self.missing: list[str] = []
        self.walls_s: list[float] = []

    def config(self, seed: int, overrides: list[str]) -> tuple[DictConfig, list[str]]:
        """The configuration of one of our runs and the overrides that make it."""
        s = self.settings
        words = [
            *overrides,
            f"data.path={self.cache.path.resolve()}",
            f"data.sites=[{s['site']}]",
            f"samples={s['samples']}",
            f"batch={s['batch']}",
            f"model.d_sae={s['d_sae']}",
            f"threads={s['threads']}",
            f"seed={seed}",
            "logger=none",
        ]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("train", [*words, "run_dir=unused"]), words

    # -------------------------------------------------------------------------------------------- the rows, as files

    def train_rows(self, seed: int) -> tuple[Path, str]:
        """The training stream of a seed as a raw file, and its SHA-256; written where it is not there yet."""
        path = self.scratch / f"train-seed{seed}.raw"
        done = path.with_suffix(".json")
        if not done.exists():
            data = build_data(self.config(seed, [])[0], Console(quiet=True))
            digest, rows = hashlib.sha256(), 0
            with path.open("wb") as file:
                for item in data.train_dataloader():
                    bits = item.x_BD.view(torch.uint8).numpy()
                    file.write(bits.data)
                    digest.update(bits.data)
                    rows += len(bits)
            write_json(done, {**self.settings, "seed": seed, "rows": rows, "sha256": digest.hexdigest()})
        made = json.loads(done.read_text(encoding="utf-8"))
        self.refuse_other(done, made)
        if made["rows"] != self.settings["samples"]:
            raise SystemExit(f"{path}: holds {made['rows']} rows, {self.settings['samples']} were wanted")
        return path, made["sha256"]

    def val_rows(self) -> Path:
        """All validation rows as a raw file."""
        path = self.scratch / f"val-{self.cache.fingerprint[:12]}.raw"
        if not path.exists():
            first, last = self.cache.num_train_rows, self.cache.num_train_rows + self.cache.num_val_rows
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(self.cache.read(self.args.site, first, last).view(torch.uint8).numpy().data)
            os.replace(temporary, path)
        return path

    def refuse_other(self, path: Path, made: dict[str, Any]) -> None:
        """A file of a campaign with other settings must not be taken for one of this campaign."""
        for name, value in self.settings.items():
            if made.get(name) != value:
                raise SystemExit(f"{path}: made with {name}={made.get(name)}, now {value}; use another --scratch")

    # -------------------------------------------------------------------------------------------- one training

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One training at a time in this scratch folder, and none while the hold file is there."""
        with (self.scratch / "turn.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            while self.args.hold and self.args.hold.exists():
                time.sleep(2)
            yield

    def cell(self, architecture: str, tool: str, lr: float, knob: float, seed: int) -> Point | None:
        """The result of one training, from its file or by running it; None where it failed or is not to be run."""
        folder = self.scratch / "cells" / architecture / re.sub(r"\W+", "-", tool)
        name = f"lr{lr:g}-knob{knob:g}-seed{seed}"
        out = folder / f"{name}.json"
        label = f"{architecture:10} {tool:21} lr {lr:<7g} knob {knob:<8g} seed {seed}"
        if not out.exists():
            if not self.train_now:
                self.missing.append(" ".join(label.split()))
                return None
            folder.mkdir(parents=True, exist_ok=True)
            with self.turn():
                if not out.exists():
                    self.run(architecture, tool, lr, knob, seed, out)
            if not out.exists():
                self.missing.append(" ".join(label.split()))
                return None
        made = self.read(out)
        if self.train_now:
            print(
                f"{time.strftime('%H:%M:%S')}  {label}  FVU {made['fvu']:.5f}  L0 {made['l0']:.3f}  "
                f"silent {made['silent_latents']:4}  {made['training_s']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return Point(knob, made["l0"], made["fvu"])

    def read(self, path: Path) -> dict[str, Any]:
        made = json.loads(path.read_text(encoding="utf-8"))
        self.refuse_other(path, made)
        return made

    def run(self, architecture: str, tool: str, lr: float, knob: float, seed: int, out: Path) -> None:
        path, sha256 = self.train_rows(seed)
        began_s = time.perf_counter()
        stem = out.with_suffix("")
        which = {"architecture": architecture, "tool": tool, "lr": lr, "knob": knob, "seed": seed}
        try:
            result = self.run_peer(which, path, stem) if tool in PEERS else self.run_ours(which, stem)
        except subprocess.CalledProcessError as error:
            print(f"{stem}: ended with status {error.returncode}; its output is in {stem}.txt", file=sys.stderr)
            return
        wall_s = time.perf_counter() - began_s
        self.walls_s.append(wall_s)
        about = {"knob_name": KNOBS[tool][architecture].name, "l0_wanted": self.args.l0, "train_sha256": sha256}
        write_json(out, {**which, **about, **self.settings, **result, "wall_s": wall_s})
        if len(self.walls_s) == 1:
            print(f"a training takes {wall_s:.0f} s; {self.estimate(wall_s)}", file=sys.stderr, flush=True)

    def estimate(self, wall_s: float) -> str:
        """Trainings by the rule, if a first search takes 2.5, others 1.2, and every second scan goes outwards."""
        searches = sum(
            (0.5 if name == "topk" else 2.5) + 1.2 * len(self.args.learning_rates) - 0.6 + len(self.args.seeds) - 1
            for name in self.args.architectures
            for tool in self.args.tools
        )
        return f"about {searches:.0f} trainings, {searches * wall_s / 60:.0f} minutes in all"

    def run_peer(self, which: dict[str, Any], path: Path, stem: Path) -> dict[str, Any]:
        spec, answer = (Path(f"{stem}.{what}") for what in ("spec", "answer"))
        paths = {"train": str(path), "val": str(self.val_rows()), "dtype": self.dtype}
        write_json(spec, {**self.settings, **paths, **which})
        script = ROOT / "benchmarks" / "peers" / PEERS[which["tool"]]
        self.call([str(self.args.peers_python), str(script), str(spec), str(answer)], Path(f"{stem}.txt"))
        return json.loads(answer.read_text(encoding="utf-8"))

    def run_ours(self, which: dict[str, Any], run_dir: Path) -> dict[str, Any]:
        tool, architecture = which["tool"], which["architecture"]
        knob = KNOBS[tool][architecture]
        value = round(which["knob"]) if knob.whole else which["knob"]
        overrides = [f"model={architecture}", *OURS[tool].split(), f"{knob.name}={value}", *self.args.ours]
        words = [*self.config(which["seed"], overrides)[1], f"optimizer.lr={which['lr']}", f"run_dir={run_dir}"]
        self.call([sys.executable, str(ROOT / "train.py"), *words], Path(f"{run_dir}.txt"))
        torch.set_num_threads(self.settings["threads"])
        sae = sparsepilot.load(run_dir)
        val = Rows(str(self.val_rows()), self.settings["d_in"], self.dtype, 4096)
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return {
            **evaluate(sae.encode, sae.decode, val),
            "training_s": summary["training_s"],
            "samples_per_s": summary["samples_per_s"],
            "options": {"overrides": overrides, "val/fvu": summary["metrics"]["val/fvu"]},
            "versions": summary["environment"],
        }

    def call(self, command: list[str], output: Path) -> None:
        with output.open("w", encoding="utf-8") as file:
            # threads that spin while they wait cost minutes a step where other programs want the cores too
            quiet = {"OMP_NUM_THREADS": str(self.settings["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
            environment = {**os.environ, **quiet}
            subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, check=True)

    # -------------------------------------------------------------------------------------------- one tool

    def search(self, architecture: str, tool: str, lr: float, start: float, near: AtL0 | None) -> AtL0 | None:
        """FVU at the L0, at one learning rate, with the first seed.

        With what was found at a near learning rate, one training close to the L0 is enough.
        """
        l0, knob, points = self.args.l0, KNOBS[tool][architecture], []
        value: float | None = start
        for _ in range(self.args.knobs):
            point = self.cell(architecture, tool, lr, value, self.args.seeds[0])
            if point is None:
                break
            points.append(point)
            if near and near.slopes and abs(math.log(point.l0 / l0)) <= math.log(NEAR):
                return along(point, near.slopes, l0, "moved")
            if (value := next_knob(points, l0, knob)) is None:
                break
        return at_l0(points, l0, knob.hit)

    def start(self, architecture: str, tool: str) -> float:
        """Where the first search begins."""
        knob = KNOBS[tool][architecture]
        if knob.start is not None:
            return knob.start
        value = OmegaConf.select(self.config(0, [f"model={architecture}"])[0], knob.name)
        if value is None:
            raise SystemExit(f"conf/model/{architecture}.yaml has no {knob.name}, by which its L0 would be set")
        return knob.near(float(value))

    def scan(self, architecture: str, tool: str) -> dict[float, AtL0]:
        """The learning rates; a search begins where the nearest rate's ended, and the best one's is finished."""
        knob = KNOBS[tool][architecture]
        found: dict[float, AtL0] = {}
        if tool in OURS and not (ROOT / "conf" / "model" / f"{architecture}.yaml").exists():
            self.missing.append(f"conf/model/{architecture}.yaml")
            return found
        starts: dict[float, float] = {}

        def look(lr: float) -> None:
            near = found.get(min(found, key=lambda other: abs(math.log(other / lr)))) if found else None
            starts[lr] = knob.near(near.knob) if near and near.how != "off" else self.start(architecture, tool)
            if at := self.search(architecture, tool, lr, starts[lr], near):
                found[lr] = at

        for lr in self.args.learning_rates:
            look(lr)
        for _ in range(self.args.outwards):
            rates = sorted(found)
            if len(rates) < len(self.args.learning_rates):  # something is missing
                break
            best = best_rate(found)
            if best == rates[0]:
                look(float(f"{best * rates[0] / rates[1]:.6g}"))
            elif best == rates[-1]:
                look(float(f"{best * rates[-1] / rates[-2]:.6g}"))
            else:
                break
        finished: set[float] = set()
        while found and len(found) >= len(self.args.learning_rates):
            best = best_rate(found)
            if found[best].how != "moved" or best in finished:
                break
            finished.add(best)
            at = self.search(architecture, tool, best, starts[best], None)
            if at and at.slopes:  # else it hit the L0 at once, as well as its knob can
                found[best] = at
        return found

    def result(self, architecture: str, tool: str) -> dict[str, Any] | None:
        """The scan, then the other seeds at the best of it."""
        found = self.scan(architecture, tool)
        if not found:
            return None
        l0, (first, *others) = self.args.l0, self.args.seeds
        lr = best_rate(found)
        at, knob = found[lr], KNOBS[tool][architecture]
        value = knob.near(at.knob)
        fvu, l0s, marks = {first: at.fvu}, {}, set()
        if at.how == "off":
            marks.add("seed 0 off the L0")
        for seed in others:
            if point := self.cell(architecture, tool, lr, value, seed):
                l0s[seed] = point.l0
                fvu[seed] = along(point, at.slopes, l0, "moved").fvu if at.slopes else point.fvu
                if abs(math.log(point.l0 / l0)) > (math.log(REACH) if at.slopes else 0.03):
                    marks.add(f"seed {seed} off the L0")
        return {
            "lr": lr,
            "at_edge": lr in (min(found), max(found)),
            "knob": {knob.name: at.knob},
            "how": at.how,
            "fvu": fvu,
            "fvu_mean": statistics.fmean(fvu.values()),
            "fvu_std": statistics.stdev(fvu.values()) if len(fvu) > 1 else None,
            "l0_of_other_seeds": l0s,
            "marks": sorted(marks),
            "tried": {f"{lr:g}": (at.fvu, at.knob, at.how) for lr, at in sorted(found.items())},
            "cells": self.cells(architecture, tool),
        }

    def cells(self, architecture: str, tool: str) -> list[dict[str, Any]]:
        """Every training of a tool that there is."""
        folder = self.scratch / "cells" / architecture / re.sub(r"\W+", "-", tool)
        return [self.read(path) for path in sorted(folder.glob("*.json"))]


# ------------------------------------------------------------------------------------------- the table


def describe(r: dict[str, Any], l0: float) -> tuple[str, str, str]:
    """The L0, the silent latents and the FVU by learning rate of one row: from the trainings at its learning rate."""
    mine = [cell for cell in r["cells"] if cell["lr"] == r["lr"]]
    near = sorted(mine, key=lambda cell: abs(math.log(max(cell["l0"], 1e-9) / l0)))[: 1 + len(r["l0_of_other_seeds"])]
    used = [f"{cell['l0']:.1f}" for cell in sorted(mine, key=lambda cell: (cell["seed"], cell["l0"]))]
    silent = f"{statistics.fmean(cell['silent_latents'] for cell in near):.0f}"
    marks = {"measured": "", "between": "", "moved": "", "beyond": " beyond", "off": " off"}
    tried = ", ".join(f"{lr}: {fvu:.4f}{marks[how]}" for lr, (fvu, _, how) in r["tried"].items())
    return ", ".join(used), silent, tried


def table(results: dict[str, dict[str, dict[str, Any] | None]], args: argparse.Namespace) -> str:
    lines = [
        f"| architecture | tool | best lr | knob there | L0 of the trainings there | FVU at L0 {args.l0:g} | std "
        "| seeds | silent latents | FVU of the first seed by lr | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for architecture, by_tool in results.items():
        for tool, r in by_tool.items():
            if r is None:
                lines.append(f"| {architecture} | {tool} | missing | | | | | 0 of {len(args.seeds)} | | | |")
                continue
            l0s, silent, tried = describe(r, args.l0)
            knob = ", ".join(f"{name} {value:.3g}" for name, value in r["knob"].items())
            std = "" if r["fvu_std"] is None else f"{r['fvu_std']:.5f}"
            marks = [*r["marks"], *(["best rate at the edge"] if r["at_edge"] else [])]
            lines.append(
                f"| {architecture} | {tool} | {r['lr']:g} | {knob} | {l0s} | {r['fvu_mean']:.4f} | {std} "
                f"| {len(r['fvu'])} of {len(args.seeds)} | {silent} | {tried} | {'; '.join(marks)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [name for phase in PHASES for name in phase]
    parser.add_argument("--scratch", type=Path, required=True, help="folder for rows, runs and results")
    parser.add_argument("--peers-python", type=Path, default=None, help="python with the peers; none: ours only")
    parser.add_argument("--architectures", nargs="+", default=everything, choices=everything)
    parser.add_argument("--tools", nargs="+", default=None, choices=list(KNOBS))
    parser.add_argument("--cache", type=Path, default=ROOT / "cache" / "demo")
    parser.add_argument("--site", default="model.layers.9")
    parser.add_argument("--samples", type=int, default=409_600)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--l0", type=float, default=32.0)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1.6e-3, 8e-4, 3.2e-3], help="in this order")
    parser.add_argument("--outwards", type=int, default=1, help="steps beyond the learning rates, at most")
    parser.add_argument("--knobs", type=int, default=4, help="trainings per learning rate to find the L0, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours", nargs="+", default=[], metavar="OVERRIDE", help="more overrides for all of ours")
    parser.add_argument("--hold", type=Path, default=None, help="no training begins while this file exists")
    parser.add_argument("--json", type=Path, default=None, help="write everything here")
    parser.add_argument("--table", action="store_true", help="the table from what is there, and what is missing")
    args = parser.parse_args()
    if len(args.learning_rates) < 2:
        parser.error("--learning-rates: at least two are needed, to know how far a step outwards is")
    if args.tools is None:
        args.tools = list(KNOBS) if args.peers_python or args.table else list(OURS)
    if not (args.peers_python or args.table) and set(args.tools) & set(PEERS):
        parser.error("--tools: the peers need --peers-python")
    args.scratch.mkdir(parents=True, exist_ok=True)
    register()
    register_resolvers()
    campaign = Campaign(args)
    if campaign.train_now:
        for phase in PHASES:
            chosen = [(name, tool) for name in phase if name in args.architectures for tool in args.tools]
            for name, tool in chosen:
                campaign.scan(name, tool)
            for name, tool in chosen:
                campaign.result(name, tool)
    campaign.missing.clear()
    campaign.train_now = False
    results = {name: {tool: campaign.result(name, tool) for tool in args.tools} for name in args.architectures}
    if args.json:
        write_json(args.json, {"settings": campaign.settings, "seeds": args.seeds, "results": results})
    print(table(results, args))
    if campaign.missing:
        print("\nNext, where it is not done (a scan goes on from there):\n")
        print("\n".join(f"- {label}" for label in dict.fromkeys(campaign.missing)))


if __name__ == "__main__":
    main()
