"""FVU and L0 of this project's TopK beside sae-lens's and dictionary-learning's, on the demo cache.

    python benchmarks/compare_quality.py --scratch /tmp/quality --samples 409600 \\
        --peers-python .venv-peers/bin/python --json result.json

How the peers' environment is made stands in `benchmarks/peers/*.py`, and so does what each tool is trained with: its
own normalisation, initialisation, auxiliary loss and schedule. Ours is `train.py` as a user runs it. All see the same
rows in the same batches: the loader's order, written once per seed into `--scratch` (a gigabyte each). One evaluator
measures all on raw validation activations (`benchmarks/peers/common.py`).

Every tool is trained at the same learning rates with the first seed; while its best stands at the edge of what was
tried, one more step outwards is tried, at most `--outwards` of them. The best one is repeated with the other seeds.
Each training is one JSON file under `--scratch`; what is there is not run again, so an interrupted campaign goes on.
`--ours 'name=override override'` adds a row of ours with other settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from peers.common import Rows, evaluate, write_json
from rich.console import Console

import sparsepilot
from sparsepilot.config.resolvers import register_resolvers
from sparsepilot.config.schema import register
from sparsepilot.data.cache import Cache
from sparsepilot.run import build_data

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"sae-lens": "sae_lens_topk.py", "dictionary-learning": "dictionary_learning_topk.py"}
OURS = ["sparsepilot=", "sparsepilot, last fifth decays=schedule=warmup_stable_decay"]


class Campaign:
    """Where things lie and what every training has in common."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scratch: Path = args.scratch.resolve()
        self.cache = Cache(args.cache, [args.site])
        self.dtype = "float32" if self.cache.dtype == "int8" else self.cache.dtype  # int8 rows come decoded
        self.ours = dict(text.split("=", 1) for text in [*OURS, *args.ours])
        self.settings = {
            "cache": self.cache.fingerprint,
            "site": args.site,
            "samples": args.samples // args.batch * args.batch,
            "batch": args.batch,
            "d_in": self.cache.widths[args.site],
            "d_sae": args.d_sae,
            "k": args.k,
            "threads": args.threads,
        }

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
            f"model.k={s['k']}",
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

    def cell(self, tool: str, lr: float, seed: int) -> dict[str, Any]:
        """The result of one training, from its file or by running it."""
        folder = self.scratch / "cells" / re.sub(r"\W+", "-", tool)
        name = f"lr{lr:g}-seed{seed}"
        out = folder / f"{name}.json"
        if not out.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path, sha256 = self.train_rows(seed)
            began_s = time.perf_counter()
            if tool in PEERS:
                result = self.run_peer(tool, lr, seed, path, folder / name)
            else:
                result = self.run_ours(self.ours[tool].split(), lr, seed, folder / name)
            wall_s = time.perf_counter() - began_s
            which = {"tool": tool, "lr": lr, "seed": seed, "train_sha256": sha256}
            write_json(out, {**which, **self.settings, **result, "wall_s": wall_s})
        made = json.loads(out.read_text(encoding="utf-8"))
        self.refuse_other(out, made)
        print(
            f"{tool:36} lr {lr:<8g} seed {seed}  FVU {made['fvu']:.5f}  L0 {made['l0']:.3f}  "
            f"silent {made['silent_latents']:4}  {made['training_s']:.0f} s  {made['samples_per_s']:,.0f} samples/s",
            file=sys.stderr,
            flush=True,
        )
        return made

    def run_peer(self, tool: str, lr: float, seed: int, path: Path, stem: Path) -> dict[str, Any]:
        spec, answer, output = (Path(f"{stem}.{what}") for what in ("spec", "answer", "txt"))
        paths = {"train": str(path), "val": str(self.val_rows()), "dtype": self.dtype}
        write_json(spec, {**self.settings, **paths, "lr": lr, "seed": seed})
        script = ROOT / "benchmarks" / "peers" / PEERS[tool]
        self.call([str(self.args.peers_python), str(script), str(spec), str(answer)], output)
        return json.loads(answer.read_text(encoding="utf-8"))

    def run_ours(self, overrides: list[str], lr: float, seed: int, run_dir: Path) -> dict[str, Any]:
        words = [*self.config(seed, overrides)[1], f"optimizer.lr={lr}", f"run_dir={run_dir}"]
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
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise SystemExit(f"{' '.join(command[:2])} ended with status {code}; its output is in {output}")

    # -------------------------------------------------------------------------------------------- one tool

    def tool(self, name: str) -> dict[str, Any]:
        """The learning rates, then the seeds at the best of them."""
        first, *others = self.args.seeds
        tried = {lr: self.cell(name, lr, first) for lr in self.args.learning_rates}
        for _ in range(self.args.outwards):
            rates = sorted(tried)
            best = min(tried, key=lambda lr: tried[lr]["fvu"])
            if best == rates[0]:
                further = float(f"{best * rates[0] / rates[1]:.6g}")
            elif best == rates[-1]:
                further = float(f"{best * rates[-1] / rates[-2]:.6g}")
            else:
                break
            tried[further] = self.cell(name, further, first)
        best = min(tried, key=lambda lr: tried[lr]["fvu"])
        cells = [tried[best], *(self.cell(name, best, seed) for seed in others)]
        fvu = [cell["fvu"] for cell in cells]
        return {
            "lr": best,
            "at_edge": best in (min(tried), max(tried)),
            "fvu": fvu,
            "fvu_mean": statistics.fmean(fvu),
            "fvu_std": statistics.stdev(fvu) if len(fvu) > 1 else 0.0,
            "l0": [cell["l0"] for cell in cells],
            "silent_latents": [cell["silent_latents"] for cell in cells],
            "wall_s": [cell["wall_s"] for cell in cells],
            "samples_per_s": [cell["samples_per_s"] for cell in cells],
            "tried": {f"{lr:g}": cell["fvu"] for lr, cell in sorted(tried.items())},
            "options": cells[0]["options"],
            "versions": cells[0]["versions"],
        }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| tool | best lr | FVU mean | std | per seed | L0 | silent latents | samples/s | FVU of seed 0 by lr |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['lr']:g} | {r['fvu_mean']:.4f} | {r['fvu_std']:.4f} "
            f"| {', '.join(f'{v:.4f}' for v in r['fvu'])} | {statistics.fmean(r['l0']):.2f} "
            f"| {statistics.fmean(r['silent_latents']):.0f} | {statistics.median(r['samples_per_s']):,.0f} "
            f"| {', '.join(f'{lr}: {v:.4f}' for lr, v in r['tried'].items())} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for rows, runs and results")
    parser.add_argument("--peers-python", type=Path, default=None, help="python with the peers; none: ours only")
    parser.add_argument("--cache", type=Path, default=ROOT / "cache" / "demo")
    parser.add_argument("--site", default="model.layers.9")
    parser.add_argument("--samples", type=int, default=409_600)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[4e-4, 8e-4, 1.6e-3])
    parser.add_argument("--outwards", type=int, default=3, help="steps beyond the learning rates, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=OVERRIDES")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="these rows alone")
    parser.add_argument("--json", type=Path, default=None, help="write the summary here")
    args = parser.parse_args()
    if len(args.learning_rates) < 2:
        parser.error("--learning-rates: at least two are needed, to know how far a step outwards is")
    args.scratch.mkdir(parents=True, exist_ok=True)
    register()
    register_resolvers()
    campaign = Campaign(args)
    names = [*campaign.ours, *(PEERS if args.peers_python else {})]
    for name in args.only or []:
        if name not in names:
            parser.error(f"--only {name!r}: the rows are {names}")
    results = {name: campaign.tool(name) for name in args.only or names}
    if args.json:
        write_json(args.json, {"settings": campaign.settings, "seeds": args.seeds, "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
