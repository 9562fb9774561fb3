"""One file of a checkpoint: tensors and plain values, flushed, ended by a checksum over all of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any, cast

import torch

from sparsepilot import faults
from sparsepilot.errors import cannot_write
from sparsepilot.run_folder import replacing

TRAILER = b"sha256\r\n"
"""Ends a file, with the SHA-256 of everything before it; torch looks for the end of its zip and does not mind."""
BLOCK_BYTES = 2**20
TRAILER_BYTES = len(TRAILER) + hashlib.sha256().digest_size


def write_sealed(path: Path, value: Any, point: str) -> str:
    """Writes `value` as torch does, all or nothing, and returns its SHA-256.

    Args:
        path: of the file.
        value: tensors, numbers, strings, lists, tuples, dicts.
        point: name of the place, before the rename, where a test may kill the process.

    Raises:
        CheckpointError: when the disk is full or not writable; the file that was there before stays.
    """
    try:
        with replacing(path, "wb") as file:
            hashed = _HashedFile(file)
            torch.save(value, cast(IO[bytes], hashed))  # torch wants `write` alone
            digest = hashed.digest()
            file.write(TRAILER + digest)
            faults.point(point)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise cannot_write(path, cause) from error
        raise
    return digest.hex()


def read_sealed(path: Path, mapped: bool = False, map_location: Any = "cpu") -> Any:
    """What `write_sealed` wrote. Always with `weights_only=True`: a checkpoint from a stranger cannot run code.

    Args:
        path: of the file.
        mapped: its tensors stay on disk until they are looked at.
        map_location: as in `torch.load`.
    """
    return torch.load(path, weights_only=True, mmap=mapped, map_location=map_location)


def digest_of(path: Path) -> str | None:
    """The SHA-256 that a file ends with, where every byte is as it was written; None where one is not.

    The checksums inside torch's zip file are not enough: one flipped bit in its directory gives zeros for a tensor.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size - TRAILER_BYTES
            digest = hashlib.sha256()
            for start in range(0, size_bytes, BLOCK_BYTES):
                digest.update(file.read(min(BLOCK_BYTES, size_bytes - start)))
            return digest.hexdigest() if size_bytes > 0 and file.read() == TRAILER + digest.digest() else None
    except OSError:
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
