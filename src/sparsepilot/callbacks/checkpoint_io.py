"""Writing a checkpoint so that a kill at any instant leaves the ones before it whole, and finding a whole one again."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from sparsepilot import faults
from sparsepilot.errors import CheckpointError
from sparsepilot.run_folder import replacing, sync_folder

NAME = re.compile(r"samples-(\d+)\.ckpt")
LAST = "last.ckpt"
TRAILER = b"sha256\r\n"
"""Ends a checkpoint, with the SHA-256 of everything before it; torch looks for the end of its zip and does not mind."""
BLOCK_BYTES = 2**20
TRAILER_BYTES = len(TRAILER) + hashlib.sha256().digest_size


class CrashSafeIO(TorchCheckpointIO):
    """Lightning's checkpoint file, written beside its final name, flushed and renamed.

    Lightning 2.6 writes through TMPDIR and does not flush: with TMPDIR on another filesystem a kill left files that
    could not be read.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Raises CheckpointError when the disk is full or not writable; earlier checkpoints stay whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path, "wb") as file:
                hashed = _HashedFile(file)
                torch.save(checkpoint, cast(IO[bytes], hashed))  # torch wants `write` alone
                file.write(TRAILER + hashed.digest())
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
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        faults.point("resume-loaded")
        return checkpoint


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
    faults.point("checkpoint-linked")
    sync_folder(path.parent)


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written.

    The checksums inside torch's zip file are not enough: one flipped bit in its directory gives zeros for a tensor.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size - TRAILER_BYTES
            digest = hashlib.sha256()
            for start in range(0, size_bytes, BLOCK_BYTES):
                digest.update(file.read(min(BLOCK_BYTES, size_bytes - start)))
            return size_bytes > 0 and file.read() == TRAILER + digest.digest()
    except OSError:
        return False


def newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[int, Path] | None:
    """The newest checkpoint that is whole, None where there is none; each damaged one is said through `say`."""
    for samples, path in list_checkpoints(folder):
        if is_whole(path):
            return samples, path
        say(f"{path} is damaged; falling back to the checkpoint before it")
    return None


class _HashedFile:
    """What torch writes a checkpoint to: hashes on the way, and may be killed half-way through any of its writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.digest = self._digest.digest
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        """Writes all of `data`."""
        self._digest.update(data)
        if faults.is_armed("checkpoint-write"):
            half = len(data) // 2
            self._file.write(data[:half])
            self._file.flush()
            faults.point("checkpoint-write")
            data = data[half:]
        return self._file.write(data)
