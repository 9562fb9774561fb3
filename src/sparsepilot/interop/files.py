"""Files that may come from a stranger: opened without running code; what is wrong with one is one clear error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.run_folder import make_folder, sync_folder


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        CheckpointError: when it is missing, damaged or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, an object with fields is needed")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: when it is missing, truncated or no safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({_line(error)})") from error


def read_notes(path: Path) -> dict[str, str]:
    """What `write_safetensors` was given as notes; empty where there are none.

    Raises:
        CheckpointError: as `read_safetensors`.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({_line(error)})") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Writes tensors, with `notes` beside them. Raises OSError where the disk is full, as any other file does."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, notes)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an npz file; arrays of objects, which would be pickles, are refused.

    Raises:
        CheckpointError: when it is missing, damaged or holds anything but numbers.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # of zip, zlib, numpy and torch, each with errors of its own
        raise CheckpointError(f"{path}: is no npz file of plain numbers ({_line(error)})") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a file of `torch.save`, unpickled with `weights_only=True`: tensors and plain values only.

    Raises:
        CheckpointError: when it is missing, damaged, or asks for anything else, as a pickle that runs code does.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # of zip, pickle and torch, each with errors of its own; torch's text advises to trust it
        raise CheckpointError(
            f"{path}: is damaged, or a pickle of more than tensors, which could run code and is never opened"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, a state dict of tensors is needed")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or _has_no_numbers(value):
            raise CheckpointError(f"{path}: {name!r} is no plain tensor under a name, as a state dict has them")
    return state


def _has_no_numbers(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` only when it is complete and on disk; on an exception it goes away.

    Raises:
        ConfigError: when `path` is there and not empty.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"out = {path}: is there already and not empty; name a folder that is not")
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    make_folder(temporary)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            else:
                sync_folder(file)
        sync_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
