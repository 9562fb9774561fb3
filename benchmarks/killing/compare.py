"""Whether two finished run folders are equal, bit for bit.

`PYTHONPATH=benchmarks python -m killing.compare runs/unbroken runs/resumed` prints the differences.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsepilot.callbacks.checkpoint_io import CrashSafeIO, is_whole, list_checkpoints

FILES = ("metrics.jsonl", "**/sae.safetensors", "**/sae.json")
"""Of several trainees each has a dictionary in its own folder."""


def run_differences(reference: Path, other: Path) -> list[str]:
    """What differs, one line each; an empty list where the runs are equal.

    Compared are the whole last checkpoint (weights, optimizer, buffers, extra state, positions) and the bytes of
    metrics.jsonl and of each sae.safetensors and sae.json. Left out is what may differ: wall-clock times, the run's id.
    """
    there = {path.relative_to(folder) for folder in (reference, other) for name in FILES for path in folder.glob(name)}
    found = [line for name in sorted(there) for line in _file_differences(str(name), reference / name, other / name)]
    if not any(name.name == "sae.json" for name in there):
        found.append("sae.json: is in neither")
    ours, theirs = (list_checkpoints(folder / "checkpoints") for folder in (reference, other))
    if not ours or not theirs or ours[0][0] != theirs[0][0]:
        return [*found, f"last checkpoint: {ours[:1]} and {theirs[:1]}"]
    damaged = [path for path in (ours[0][1], theirs[0][1]) if not is_whole(path)]
    if damaged:
        return [*found, *(f"{path}: damaged" for path in damaged)]
    states = [CrashSafeIO().load_checkpoint(path, map_location="cpu") for path in (ours[0][1], theirs[0][1])]
    return [*found, *value_differences("checkpoint", *states)]


def value_differences(name: str, a: Any, b: Any) -> Iterator[str]:
    """Names of the leaves of two nested values that differ in type, shape or any bit (NaN equals the same NaN)."""
    if type(a) is not type(b):
        yield f"{name}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, dict):
        if list(a) != list(b):
            yield f"{name}: keys {list(a)} and {list(b)}"
        for key in a.keys() & b.keys():
            yield from value_differences(f"{name}.{key}", a[key], b[key])
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{name}: {len(a)} and {len(b)} items"
        for number, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from value_differences(f"{name}.{number}", one, other)
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            yield f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        elif not torch.equal(_bits(a), _bits(b)):
            yield f"{name}: {int((_bits(a) != _bits(b)).sum())} of {_bits(a).numel()} bytes differ"
    elif repr(a) != repr(b):
        yield f"{name}: {a!r} and {b!r}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _file_differences(name: str, a: Path, b: Path) -> Iterator[str]:
    missing = [str(path) for path in (a, b) if not path.exists()]
    if missing:
        yield f"{name}: {missing} is not there"
        return
    ours, theirs = a.read_bytes(), b.read_bytes()
    if ours != theirs:
        place = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), -1)
        line = ours[:place].count(b"\n") + 1 if place >= 0 else "end"
        yield f"{name}: {len(ours)} and {len(theirs)} bytes, first difference in line {line}"


if __name__ == "__main__":
    differences = run_differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(differences) or "equal, bit for bit")
    sys.exit(bool(differences))
