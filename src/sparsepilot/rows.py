"""The append-only metrics file: Python ints and full-precision floats, cut back on resume, never rewritten."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sparsepilot import faults
from sparsepilot.errors import CheckpointError

RowMapping = Mapping[str, Any]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a metrics file in order; a torn last line is left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


class RowFile:
    """Appends rows. Opening cuts everything past `samples` and a torn last line, so that a resumed run goes on as if it
    had never been broken."""

    def __init__(self, path: Path, samples: int) -> None:
        self._fault = f"{path.stem}-append"  # metrics-append, timing-append
        keep_bytes = 0
        if path.exists():
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["samples"] > samples:
                        break
                    keep_bytes += len(line)
            os.truncate(path, keep_bytes)
            faults.point("resume-cut")
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115 - stays open as long as the run

    def append(self, row: RowMapping) -> None:
        """Writes one row in one go; CheckpointError when the disk is full: a torn last line is cut on resume."""
        line = json.dumps(row).encode() + b"\n"
        if faults.is_armed(self._fault):
            self._file.write(line[: len(line) // 2])
            faults.point(self._fault)
            line = line[len(line) // 2 :]
        try:
            while line:  # a nearly full disk takes a part of it
                line = line[self._file.write(line) :]
        except OSError as error:
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
            raise CheckpointError(
                f"cannot write {self._file.name}: {why}; checkpoints written before are whole, free some space and "
                "start again"
            ) from error

    def sync(self) -> None:
        """Makes what was appended durable; called before a checkpoint that relies on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; the object is of no use afterwards."""
        self._file.close()
