"""Writing a checkpoint so that a kill at any instant leaves the ones before it whole, and finding a whole one again."""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from sparsepilot import faults
from sparsepilot.errors import CheckpointError
from sparsepilot.run_folder import replacing, sync_folder

NAME = re.compile(r"samples-(\d+)\.ckpt")
LAST = "last.ckpt"


class CrashSafeIO(TorchCheckpointIO):
    """Lightning's checkpoint file, written beside its final name, flushed and renamed.

    Lightning 2.6 writes through TMPDIR and does not flush: with TMPDIR on another filesystem a kill left unreadable files.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Raises CheckpointError when the disk is full or not writable; earlier checkpoints stay whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path, "wb") as file:
                torch.save(checkpoint, _FaultyFile(file) if faults.is_armed("checkpoint-write") else file)
                faults.point("checkpoint-rename")
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):
                why = "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(cause)
                raise CheckpointError(
                    f"cannot write {path}: {why}; checkpoints written before are whole, free some space and start again"
                ) from error
            raise

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads with `weights_only=True`, always: a checkpoint from a stranger cannot run code."""
        return torch.load(path, map_location=map_location, weights_only=True)  # type: ignore[no-any-return]


def checkpoint_name(samples: int) -> str:
    """File name of the checkpoint at this place of the clock.

    >>> checkpoint_name(4096)
    'samples-000000004096.ckpt'
    """
    return f"samples-{samples:012d}.ckpt"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(samples, path) of the complete checkpoints in `folder`, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("samples-*.ckpt") if (match := NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def point_last_at(path: Path) -> None:
    """Makes `last.ckpt` a link to `path`, in one step."""
    temporary = path.with_name(LAST + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    faults.point("checkpoint-link")
    os.replace(temporary, path.with_name(LAST))
    sync_folder(path.parent)


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint still matches the checksums that torch wrote into the file (it is a zip)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return False


def newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[int, Path] | None:
    """The newest checkpoint that is whole, None where there is none; each damaged one is said through `say`."""
    for samples, path in list_checkpoints(folder):
        if is_whole(path):
            return samples, path
        say(f"{path} is damaged; falling back to the checkpoint before it")
    return None


class _FaultyFile:
    """Passes writes on and offers a fault point half-way through the third one: only built when a test asks for it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._writes = 0

    def write(self, data: Any) -> int:
        self._writes += 1
        if self._writes == 3:
            view = memoryview(data)
            self._file.write(view[: len(view) // 2])
            self._file.flush()
            faults.point("checkpoint-write")
            self._file.write(view[len(view) // 2 :])
            return len(view)
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
