"""The append-only metrics file: Python ints and full-precision floats, cut back on resume, never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sparsepilot import faults
from sparsepilot.errors import ConfigError, cannot_write

RowMapping = Mapping[str, Any]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a metrics file in order; a torn last line is left out.

    Raises:
        ConfigError: at a whole line that is no row.
    """
    for row, _ in _lines(path):
        if isinstance(row, ConfigError):
            raise row
        yield row


def rows_up_to(path: Path, samples: int) -> Iterator[dict[str, Any]]:
    """The rows that a checkpoint at the clock `samples` covers. Those behind them were not made durable: a machine that
    went down may have left a hole there, which is no damage.

    Raises:
        ConfigError: at a damaged line that one of those rows follows.
    """
    yield from (row for row, _ in _up_to(path, samples))


def _up_to(path: Path, samples: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Those rows, and where in the file each of them ends."""
    damage = None
    for row, end in _lines(path):
        if isinstance(row, ConfigError):
            damage = damage or row
        elif row["samples"] > samples:
            return
        elif damage is not None:
            raise damage
        else:
            yield row, end


def _lines(path: Path) -> Iterator[tuple[dict[str, Any] | ConfigError, int]]:
    """Every line but a torn last one, or what is wrong with it, and where in the file it ends."""
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                yield ConfigError(f"{path}: line {number} is damaged ({error})"), end
                continue
            is_row = isinstance(row, dict) and "samples" in row
            yield row if is_row else ConfigError(f"{path}: line {number} is {row!r}, no row"), end


def rows_of_trainee(rows: Iterable[RowMapping], name: str, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows that one of several trainees would have alone: its own keys without its name, and what all share; rows
    that say nothing of it are left out.

    >>> list(rows_of_trainee([{"step": 1, "a/l0": 5, "b/l0": 6}, {"step": 2, "b/l0": 7}], "a", ["a", "b"]))
    [{'step': 1, 'l0': 5}]
    """
    others = tuple(f"{other}/" for other in names if other != name)
    for row in rows:
        if any(key.startswith(f"{name}/") for key in row):
            yield {key.removeprefix(f"{name}/"): v for key, v in row.items() if not key.startswith(others)}


class RowFile:
    """Appends rows. Opening cuts everything past `samples` and a torn last line, so that a resumed run goes on as if it
    had never been broken."""

    def __init__(self, path: Path, samples: int) -> None:
        self._fault = f"{path.stem}-append"  # metrics-append, timing-append
        keep_bytes = 0
        if path.exists():
            for _, end in _up_to(path, samples):
                keep_bytes = end
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
            raise cannot_write(self._file.name, error) from error

    def sync(self) -> None:
        """Makes what was appended durable; called before a checkpoint that relies on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; the object is of no use afterwards."""
        self._file.close()
