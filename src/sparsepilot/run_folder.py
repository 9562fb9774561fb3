"""What lies where in a run folder, and how its files are written so that a kill never leaves half of one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsepilot.errors import ConfigError, cannot_write


class RunFolder:
    """Paths of one run.

    config.yaml       resolved configuration (config-1.yaml, ... are those before a resume changed something)
    run.json          the run's id, when it was made, the fingerprint of its cache, and when it was started from where
    live.json         of a run without a cache: statistics of its rows, and what they depend on
    metrics.jsonl     one row per logged step and per validation: the truth that every picture is drawn from
    timing.jsonl      wall-clock figures, which differ between two runs that are otherwise equal
    checkpoints/      last.ckpt points at the newest of samples-*.ckpt
    sae.safetensors   the trained autoencoder, beside sae.json
    summary.json      final value of every metric, samples, wall time, versions
    report/           the pictures, as PNG and SVG, and report.html with all of them; drawn from the files above
    features/         what scripts/features.py found out about each latent: index.html, features.jsonl
    <trainee>/        of several trainees each one's dictionary, with config.yaml and summary.json as if it were alone
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.identity = self.path / "run.json"
        self.live = self.path / "live.json"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report"
        self.features = self.path / "features"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config.exists()

    def of_trainee(self, name: str) -> RunFolder:
        """Of a run with several trainees, the folder of one: its configuration, summary and dictionary."""
        return RunFolder(self.path / name)

    def older_config(self) -> Path:
        """The first free config-N.yaml."""
        number = 1
        while (self.path / f"config-{number}.yaml").exists():
            number += 1
        return self.path / f"config-{number}.yaml"


def make_folder(path: Path, field: str = "out") -> None:
    """Makes a folder and those above it, unless it is there.

    Raises:
        ConfigError: begun with `field`, where it cannot be made: a file is in its place or above it, or it is no place
            to write to.
    """
    with _refusing(path, field):
        path.mkdir(parents=True, exist_ok=True)


def check_folder(path: Path, field: str = "out") -> None:
    """Raises what `make_folder` would, and makes nothing that stays."""
    with _refusing(path, field):
        place = path
        while not (place.exists() or place.is_symlink()):
            place = place.parent
        os.rmdir(tempfile.mkdtemp(prefix=".sparsepilot-", dir=place))  # asked in words, /proc and root say yes


@contextlib.contextmanager
def _refusing(path: Path, field: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{field} = {path}: no folder can be made there ({error.strerror}); name another") from error


@contextlib.contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` only when what was written there is complete and on disk.

    `<name>.tmp` in the same folder is flushed to the device, renamed, and the folder flushed. On an exception the
    temporary file is removed and the old one stays.

    Raises:
        CheckpointError: naming `path`, where the disk is full or not writable.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # a write that fails names no file; another file, which is read meanwhile, is named
        if isinstance(error, OSError) and str(error.filename or temporary) == str(temporary):
            raise cannot_write(path, error) from error
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Like `replacing_path`, as an open file."""
    with replacing_path(path) as temporary, open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, all or nothing."""
    with replacing(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")
