"""Training on live activations beside training from a cache of the same text, in samples per second.

    python benchmarks/live.py --scratch /tmp/live -- samples=1_000_000
    python benchmarks/live.py --scratch /tmp/live --live data.lm_device=cuda:1 -- trainer=gpu lm=hf lm.id=... \\
        'data.sites=[model.layers.12]' data.window_mb=4096 text=hf_dataset text.name=... text.max_documents=null \\
        data.max_tokens=20_000_000

What follows `--` goes to both runs, text and model included; `--live` and `--cached` to one of them. The cache is
written first, by the same recipe, and its time told beside the run's. Speeds leave out the first tenth of the rows of
timing.jsonl: filling the window, compiling, warming up. One JSON object per run and line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from sparsepilot.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ("dtype", "context_length", "batch_contexts", "max_tokens", "val_fraction")
"""Fields that data=live has under `data` and a cache's recipe under `data.build`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, required=True, help="cache and runs go there; a cache there is used again"
    )
    parser.add_argument("--live", nargs="*", default=[], help="overrides of the live run alone")
    parser.add_argument("--cached", nargs="*", default=[], help="overrides of the cached run alone")
    parser.add_argument("overrides", nargs="*", help="of both, as for train.py data=live")
    args = parser.parse_args()
    both = [*args.overrides, "logger=none", "report=false"]
    if not any(word.startswith("data.sites=") for word in both):
        both.append("data.sites=[model.layers.9]")

    data = ["data=lm", f"data.path={args.scratch}/cache", *map(as_recipe, both)]
    of_cache = [word for word in data if word.startswith(("data", "lm", "text")) and not_of_runs(word)]
    began_s = time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "cache_activations.py", *of_cache], check=True, stdout=sys.stderr
    )
    cache_s = time.perf_counter() - began_s
    cached = [word for word in data if not word.startswith(("data.stats_rows", "data.lm_device"))]
    show("cached", train([*cached, *args.cached], args.scratch / "cached"), cache_s=round(cache_s, 1))
    show("live", train(["data=live", *both, *args.live], args.scratch / "live"))


def as_recipe(word: str) -> str:
    """`data.max_tokens=9` as a cache's recipe has it."""
    name, equals, value = word.partition("=")
    field = name.removeprefix("data.")
    return f"data.build.{field}{equals}{value}" if name.startswith("data.") and field in RECIPE else word


def not_of_runs(word: str) -> bool:
    """Whether a cache is made with it."""
    return word.partition("=")[0] not in ("data.stats_rows", "data.lm_device")


def train(words: list[str], folder: Path) -> dict[str, float]:
    """Runs train.py in a fresh folder; its speed and waiting."""
    began_s = time.time()
    command = [sys.executable, ROOT / "train.py", *words, f"run_dir={folder}-{int(began_s)}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = list(read_rows(Path(f"{folder}-{int(began_s)}") / "timing.jsonl"))
    steady = rows[max(1, len(rows) // 10) :]
    seconds = sum(row["elapsed_s"] for row in steady)
    return {
        "samples": rows[-1]["samples"],
        "start_s": round(rows[0]["time"] - began_s, 1),
        "samples_per_s": round((steady[-1]["samples"] - rows[max(1, len(rows) // 10) - 1]["samples"]) / seconds, 1),
        "data_wait_fraction": round(sum(row["data_wait_fraction"] * row["elapsed_s"] for row in steady) / seconds, 4),
    }


def show(name: str, result: dict[str, float], **more: float) -> None:
    """One line of JSON."""
    print(json.dumps({"run": name, **result, **more}), flush=True)


if __name__ == "__main__":
    main()
