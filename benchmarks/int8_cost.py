"""What an int8 cache costs: the same run on bf16 and on int8 rows, both judged on the bf16 validation rows.

    python benchmarks/int8_cost.py --samples 1000000 --seeds 0 1 2

Builds cache/demo and cache/demo_int8 where they are missing (same model, text and seed, hence the same rows); prints
their sizes on disk, the FVU of the int8 rows themselves, and that of the dictionaries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sparsepilot
from sparsepilot.data.cache import Cache
from sparsepilot.metrics.fvu import FVU

ROOT = Path(__file__).resolve().parents[1]
SITE = "model.layers.9"
CACHES = {"bfloat16": ROOT / "cache" / "demo", "int8": ROOT / "cache" / "demo_int8"}


def val_rows(cache: Cache) -> torch.Tensor:
    """[N, D] validation rows in fp32."""
    return cache.read(SITE, cache.num_train_rows, cache.num_train_rows + cache.num_val_rows).float()


def train(dtype: str, samples: int, seed: int, into: Path) -> sparsepilot.interop.dictionary.Dictionary:
    """Runs train.py on one of the caches and loads what it exported."""
    run = into / f"{dtype}-{seed}"
    words = [f"data.path={CACHES[dtype]}", f"data.build.dtype={dtype}", f"samples={samples}", f"seed={seed}"]
    command = [sys.executable, ROOT / "train.py", *words, f"run_dir={run}", "logger=none", "report=false"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sparsepilot.load(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for dtype, path in CACHES.items():
        command = [sys.executable, ROOT / "scripts" / "cache_activations.py", "data=demo", f"data.path={path}"]
        subprocess.run([*command, f"data.build.dtype={dtype}"], check=True)
    caches = {dtype: Cache(path) for dtype, path in CACHES.items()}
    x_ND = val_rows(caches["bfloat16"])
    mean_D = caches["bfloat16"].stats(SITE).mean_D

    def fvu_of(x_hat_ND: torch.Tensor) -> float:
        metric = FVU(mean_D)
        metric.update(x_ND, x_hat_ND)
        return float(metric.compute())

    result: dict[str, object] = {"samples": args.samples, "seeds": args.seeds}
    for dtype, path in CACHES.items():
        result[f"{dtype} MiB"] = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**20
    result["FVU of the int8 rows"] = fvu_of(val_rows(caches["int8"]))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        for dtype in CACHES:
            values = []
            for seed in args.seeds:
                sae = train(dtype, args.samples, seed, Path(scratch))
                values.append(fvu_of(torch.cat([sae(x_BD) for x_BD in x_ND.split(4096)])))
            result[f"FVU trained on {dtype}"] = values
            result[f"FVU trained on {dtype}, mean"] = statistics.mean(values)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
