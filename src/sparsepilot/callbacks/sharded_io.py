"""A checkpoint whose tensors are spread over ranks: a folder to which every rank writes its part.

    samples-000000004096.ckpt/
        rank-00000.ckpt, ...   the parts that this rank holds, by the tensor's name; a part that several ranks hold is
                               written by the first of them
        index.ckpt             all the rest as rank 0 has it, an empty tensor in the place of each that is spread; where
                               their parts are; the SHA-256 of every other file. Written last.

Each file is sealed (sealed_file.py). The folder is written under a temporary name, which rank 0 changes when every rank
has flushed its file. Any number of ranks reads it, whatever each of them wants to hold.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparsepilot import faults
from sparsepilot.callbacks.sealed_file import digest_of, read_sealed, write_sealed
from sparsepilot.errors import CheckpointError, cannot_write
from sparsepilot.parallel.agreement import from_all, from_first
from sparsepilot.parallel.mesh import world
from sparsepilot.parallel.shards import Box, box_of, own
from sparsepilot.run_folder import sync_folder

INDEX = "index.ckpt"
HASHING_THREADS = 4

Keys = tuple[Any, ...]
"""Where a value lies in a checkpoint: `("state_dict", "trainees.sae.autoencoder.W_enc")`"""
Place = Callable[[Keys, Tensor], DTensor | None]
"""(where it lies, a tensor of its shape) -> a tensor that is spread as it shall be; None: whole on every rank"""


def is_spread(checkpoint: Any) -> bool:
    """Whether one of its tensors is."""
    found: list[Tensor] = []
    _map_tensors(checkpoint, (), lambda _, tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return any(isinstance(tensor, DTensor) for tensor in found)


def save_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes the folder. Every rank calls it, with its own parts of the same tensors.

    Raises:
        CheckpointError: on all ranks, when one of them cannot write; earlier checkpoints stay whole.
    """
    spread: dict[str, DTensor] = {}

    def leave_out(keys: Keys, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        spread[_name(keys)] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = _map_tensors(checkpoint, (), leave_out)
    held = from_all({name: box_of(tensor) for name, tensor in spread.items()})
    mine = [name for name in spread if _writer(held, name, held[world().rank][name]) == world().rank]
    temporary = path.with_name(path.name + ".tmp")
    from_first(lambda: _make_fresh(temporary))
    told: tuple[str, str] | CheckpointError
    try:
        temporary.mkdir(exist_ok=True)  # another machine may not have seen it yet
        file = temporary / f"rank-{world().rank:05d}.ckpt"
        told = (file.name, write_sealed(file, {name: _compact(own(spread[name])) for name in mine}, "checkpoint-shard"))
    except CheckpointError as error:
        told = error
    except OSError as error:
        told = cannot_write(temporary, error)
    files = {}
    for one in from_all(told):
        if isinstance(one, CheckpointError):
            raise one
        files[one[0]] = one[1]

    def seal() -> None:
        for name in files:
            if not (temporary / name).exists():
                raise CheckpointError(
                    f"cannot write {path}: {name} is not there, which another rank has written; all ranks need one "
                    "run folder on one filesystem"
                )
        write_sealed(temporary / INDEX, {"files": files, "parts": _parts(held), "rest": rest}, "checkpoint-index")
        _put_in_place(temporary, path)

    from_first(seal)


def load_any(path: Path, place: Place | None = None) -> dict[str, Any]:
    """A checkpoint of either form, each tensor whole (on CPU) or, where `place` says so, spread.

    Raises:
        CheckpointError: where a part is missing.
    """
    if path.is_dir():
        index = read_sealed(path / INDEX, mapped=True)
        parts, rest = index["parts"], index["rest"]
    elif place is None:
        return dict(read_sealed(path))
    else:
        parts, rest = {}, read_sealed(path, mapped=True)
    opened: dict[str, dict[str, Tensor]] = {}

    def part(file: str, name: str) -> Tensor:
        if file not in opened:
            opened[file] = read_sealed(path / file, mapped=True)
        return opened[file][name]

    def fill(keys: Keys, stored: Tensor) -> Tensor:
        layout = place(keys, stored) if place is not None else None
        wanted = Box((0,) * stored.ndim, tuple(stored.shape)) if layout is None else box_of(layout)
        if stored.device.type != "meta":
            local = stored[wanted.slices].clone()
        else:
            name, num_found = _name(keys), 0
            local = torch.empty(wanted.shape, dtype=stored.dtype)
            for file, start, shape in parts.get(name, ()):
                box = Box(tuple(start), tuple(shape))
                common = wanted.overlap(box)
                found = local[common.within(wanted)]
                if found.numel() > 0:
                    found.copy_(part(file, name)[common.within(box)])
                    num_found += found.numel()
            if num_found != local.numel():
                raise CheckpointError(f"{path}: holds {num_found} of {local.numel()} numbers of {name}")
        if layout is None:
            return local
        return DTensor.from_local(
            local.to(layout.device), layout.device_mesh, layout.placements, run_check=False,
            shape=layout.shape, stride=layout.stride(),
        )  # fmt: skip

    return dict(_map_tensors(rest, (), fill))


def is_whole_folder(path: Path) -> bool:
    """Whether every byte of every file of a sharded checkpoint is as it was written."""
    if digest_of(path / INDEX) is None:
        return False
    try:
        files: dict[str, str] = read_sealed(path / INDEX, mapped=True)["files"]
    except (UnpicklingError, KeyError, TypeError):  # somebody else's
        return False
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing lets other threads run
        return list(pool.map(lambda name: digest_of(path / name), files)) == list(files.values())


def remove(path: Path) -> None:
    """Removes a checkpoint of either form, or what is left of one; a folder first loses the name by which it counts."""
    if path.is_dir() and not path.is_symlink():
        gone = path if path.suffix == ".tmp" else path.with_name(path.name + ".old.tmp")
        if gone != path:
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def _make_fresh(folder: Path) -> None:
    try:
        remove(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _put_in_place(temporary: Path, path: Path) -> None:
    try:
        sync_folder(temporary)
        if path.exists():
            remove(path)  # of the same place of the clock
        faults.point("checkpoint-rename")
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _map_tensors(value: Any, keys: Keys, change: Callable[[Keys, Tensor], Tensor]) -> Any:
    """The same nested value with its tensors changed."""
    if isinstance(value, Tensor):
        return change(keys, value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, (*keys, key), change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, (*keys, number), change) for number, item in enumerate(value))
    return value


def _name(keys: Keys) -> str:
    return "/".join(map(str, keys))


def _writer(held: list[dict[str, Box]], name: str, box: Box) -> int:
    """The first rank that holds exactly this part."""
    return next(number for number, boxes in enumerate(held) if boxes.get(name) == box)


def _parts(held: list[dict[str, Box]]) -> dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """By a tensor's name: file, start and shape of each part, those of no size left out."""
    parts: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    for number, boxes in enumerate(held):
        for name, box in boxes.items():
            if 0 not in box.shape and _writer(held, name, box) == number:
                parts.setdefault(name, []).append((f"rank-{number:05d}.ckpt", box.start, box.shape))
    return parts


def _compact(tensor: Tensor) -> Tensor:
    """On CPU, without the memory around it that torch would write along."""
    tensor = tensor.cpu()
    exact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if exact and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
