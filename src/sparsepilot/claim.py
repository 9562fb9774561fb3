"""Taking possession of a run folder: is a run there already, may it go on, from where, and is nobody else at it?"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from sparsepilot import faults, slurm
from sparsepilot.callbacks.checkpoint_io import list_checkpoints, newest_whole
from sparsepilot.config.resume import Change, allowed_changes
from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.parallel.agreement import from_first
from sparsepilot.reporting.environment import environment
from sparsepilot.run_folder import RunFolder, replacing, write_json
from sparsepilot.saved import read_config, read_object


@dataclass
class Claim:
    """A run folder that this process owns."""

    folder: RunFolder
    goes_on: bool = False
    """whether a run lay there when it was claimed"""
    samples: int = 0
    """where the run goes on, 0 for a fresh one"""
    checkpoint: Path | None = None
    changes: list[Change] = field(default_factory=list)
    """allowed differences from the configuration that the run was begun with"""
    notes: list[str] = field(default_factory=list)
    """what the user should read"""
    writes: bool = True
    """whether this process writes to the folder: of several ranks the first one does"""
    _lock: IO[Any] | None = None

    def lock(self) -> None:
        """Holds the folder until `release`, or until this process is gone; makes it where there is none.

        Raises ConfigError when another process is training there, or has trained there since it was found fresh.
        """
        if self._lock is not None or not self.writes:
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ConfigError(f"run_dir = {self.folder.path}: another process is training there") from error
        except OSError:
            pass  # a filesystem without locks: as before there were any
        if not self.goes_on and self.folder.exists():  # building a cache takes hours, and locks nothing
            self.release()
            raise ConfigError(
                f"run_dir = {self.folder.path}: another process has begun a run there in the meantime; the same line "
                "again goes on with it"
            )

    def release(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def claim(run_dir: str, resume: str, config: dict[str, Any]) -> Claim:
    """Finds the folder to train in, and the checkpoint to go on from where it holds a run already.

    Writes nothing but the lock, and that only where a run lies already.

    Raises:
        ConfigError: when the configuration there is that of another run, or another process is at it.
        CheckpointError: when it has checkpoints and every one is damaged.
    """
    folder = RunFolder(run_dir)
    if not folder.exists():
        return Claim(folder)
    if resume == "never":
        newest, fresh, number = folder, RunFolder(f"{run_dir}-2"), 2
        while fresh.exists():
            number += 1
            newest, fresh = fresh, RunFolder(f"{run_dir}-{number}")
        if not _was_begun_by_this_job(newest):
            return Claim(fresh, notes=[f"{folder.path} holds a run; starting a fresh one in {fresh.path}"])
        folder = newest
    if not folder.identity.exists():
        raise ConfigError(f"run_dir = {folder.path}: is one of several trainees of another run; set another run_dir")
    found = Claim(folder, goes_on=True, changes=allowed_changes(read_config(folder), config))
    found.lock()
    whole = newest_whole(folder.checkpoints, say=lambda text: found.notes.append(f"warning: {text}"))
    if whole is not None:
        found.samples, found.checkpoint = whole
    elif list_checkpoints(folder.checkpoints):
        found.release()
        raise CheckpointError(f"{folder.checkpoints}: every checkpoint is damaged; resume=never begins anew beside it")
    found.notes.append(f"resuming {folder.path} at {found.samples:,} samples")
    found.notes += [f"  changed: {change}" for change in found.changes]
    return found


def _was_begun_by_this_job(folder: RunFolder) -> bool:
    """Whether this is a job that Slurm has requeued, and the run its own: `resume=never` was said of what was there
    when the job was submitted."""
    if not slurm.was_requeued() or not folder.identity.exists():
        return False
    starts = read_object(folder.identity).get("starts", [])
    return bool(starts) and starts[0].get("slurm_job") == slurm.job()


def claim_together(run_dir: str, resume: str, config: dict[str, Any]) -> Claim:
    """`claim` on rank 0 for all ranks: the others are told what it found, and look at nothing themselves.

    (Two ranks that look by themselves may see two states of one folder, or two folders where its name has a time.)
    """
    own: list[Claim] = []

    def look() -> Claim:
        own.append(claim(run_dir, resume, config))
        return replace(own[0], writes=False, _lock=None)

    told = from_first(look)
    return own[0] if own else told


def record_start(
    folder: RunFolder, config: dict[str, Any], cache_fingerprint: str, samples: int, trains: bool = True
) -> None:
    """Writes config.yaml (keeping the one before, where it changed) and run.json, to which each start is added that
    `trains`: one of a finished run has nothing to do."""
    text = OmegaConf.to_yaml(OmegaConf.create(config))
    if folder.identity.exists():
        identity = read_object(folder.identity)
    else:
        identity = {
            "id": os.urandom(4).hex(),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "cache_fingerprint": cache_fingerprint,
            "environment": environment(),
        }
    start = {"time": time.time(), "samples": samples, "host": socket.gethostname(), "slurm_job": slurm.job()}
    write_json(folder.identity, {**identity, "starts": [*identity.get("starts", []), *([start] if trains else [])]})
    if folder.exists():
        before = folder.config.read_text(encoding="utf-8")
        if before == text:
            return
        with replacing(folder.older_config()) as file:
            file.write(before)
    with replacing(folder.config) as file:
        file.write(text)
        faults.point("config-write")


def record_trainees(folder: RunFolder, configs: dict[str, dict[str, Any]]) -> None:
    """Gives each of several trainees a folder with the configuration of the run that would train it alone."""
    for name, config in configs.items():
        own = folder.of_trainee(name)
        own.path.mkdir(exist_ok=True)
        with replacing(own.config) as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(config)))
