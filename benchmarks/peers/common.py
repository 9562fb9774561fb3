"""What the trainings of all tools share: the rows, the evaluator, the form of a result. Needs numpy and torch only."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


class Rows:
    """A raw file of activation rows, [num_rows, width], read batch by batch as fp32; every iteration begins anew."""

    def __init__(self, path: str, width: int, dtype: str, batch: int) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.bits = np.memmap(path, dtype=BITS[dtype], mode="r").reshape(-1, width)
        self.batch = batch

    def __len__(self) -> int:
        """Batches; the last may be short."""
        return -(-len(self.bits) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(len(self)):
            part = np.array(self.bits[i * self.batch : (i + 1) * self.batch])  # a copy: some tools scale in place
            yield torch.from_numpy(part).view(self.dtype).float()


@torch.no_grad()
def evaluate(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], rows: Rows) -> dict[str, Any]:
    """Quality on raw activations, the same for every tool.

    fvu = sum ||x - decode(encode(x))||^2 / sum ||x - mean||^2, with the mean over these rows, sums in fp64;
    l0 = codes other than 0 per row; silent_latents = latents with no such code in any row.
    """
    num_rows = len(rows.bits)
    mean_D = sum(x.double().sum(dim=0) for x in rows) / num_rows
    sq_error = sq_deviation = active = 0.0
    fired_F: Tensor | None = None
    for x_BD in rows:
        codes_BF = encode(x_BD)
        on_BF = codes_BF != 0
        fired_F = on_BF.any(dim=0) if fired_F is None else fired_F | on_BF.any(dim=0)
        active += float(on_BF.sum())
        sq_error += float((x_BD.double() - decode(codes_BF).double()).square().sum())
        sq_deviation += float((x_BD.double() - mean_D).square().sum())
    silent = int((~fired_F).sum()) if fired_F is not None else 0
    return {"fvu": sq_error / sq_deviation, "l0": active / num_rows, "silent_latents": silent, "val_rows": num_rows}


def shares(spec: dict[str, Any]) -> dict[str, int]:
    """The lengths of a run's phases, in steps, the same share of the budget for every tool.

    The tools' own lengths (penalty warm-ups of 2,000 and 5,000 steps, dead windows of 1,000 steps and of 10M samples)
    suit runs of 25,000 steps and more; here they would outlast the whole run and switch off what they belong to.
    """
    steps = spec["samples"] // spec["batch"]
    decay_steps = steps // 5
    return {
        "steps": steps,
        "warmup_steps": min(10, steps // 10),
        "penalty_steps": steps // 4,
        "dead_steps": max(1, steps // 10),
        "decay_steps": decay_steps,
        "decay_start": steps - decay_steps,
    }


def group_sizes(d_sae: int) -> list[int]:
    """Matryoshka's nested groups: those of dictionary-learning's demo, for every tool."""
    sizes = [d_sae // 32, d_sae // 16, d_sae // 8, d_sae // 4]
    return [*sizes, d_sae - sum(sizes)]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """All or nothing, so that a cell that exists is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def run_peer(package: str, train: Callable[[dict[str, Any], Rows], tuple[Any, dict[str, Any]]]) -> None:
    """Main function of a peer's script: reads a specification, trains, evaluates, writes one JSON file.

    `train(spec, rows)` returns an object with `encode` and `decode` for raw activations, and what it was trained with.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path, help="JSON written by compare_quality.py")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    spec = json.loads(args.spec.read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    began_s = time.perf_counter()
    sae, options = train(spec, Rows(spec["train"], spec["d_in"], spec["dtype"], spec["batch"]))
    training_s = time.perf_counter() - began_s
    result = {
        **evaluate(sae.encode, sae.decode, Rows(spec["val"], spec["d_in"], spec["dtype"], 4096)),
        "training_s": training_s,
        "samples_per_s": spec["samples"] / training_s,
        "options": options,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, package: version(package)},
    }
    write_json(args.out, result)
