"""Writing a checkpoint so that a kill at any instant leaves the ones before it whole, and finding a whole one again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from sparsepilot import faults
from sparsepilot.callbacks.sealed_file import digest_of, read_sealed, write_sealed
from sparsepilot.callbacks.sharded_io import Place, is_spread, is_whole_folder, load_any, save_sharded
from sparsepilot.parallel.collectives import rank
from sparsepilot.run_folder import sync_folder

NAME = re.compile(r"samples-(\d+)\.ckpt")
LAST = "last.ckpt"


class CrashSafeIO(TorchCheckpointIO):
    """Checkpoints in two forms: a file, or where tensors are spread over ranks a folder of one file a rank.

    Either is written beside its final name, flushed and renamed. Lightning 2.6 writes through TMPDIR and does not
    flush: with TMPDIR on another filesystem a kill left files that could not be read; a sharded one it writes in place.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """A folder where a tensor is spread (then all ranks must call this), otherwise a file, which rank 0 writes.

        Raises CheckpointError when the disk is full or not writable; earlier checkpoints stay whole.
        """
        path = Path(path)
        if is_spread(checkpoint):
            save_sharded(checkpoint, path)
        elif rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(path, checkpoint, "checkpoint-rename")

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
        place: Place | None = None,
    ) -> dict[str, Any]:
        """Loads either form with `weights_only=True`, always: a checkpoint from a stranger cannot run code.

        Args:
            path: of the checkpoint.
            map_location: where the tensors of a file go.
            weights_only: is taken as True.
            place: how a tensor shall be spread over ranks; None: every tensor is whole.
        """
        path = Path(path)
        checkpoint: dict[str, Any]
        if path.is_dir() or place is not None:
            checkpoint = load_any(path, place)
        else:
            checkpoint = read_sealed(path, map_location=map_location)
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
    """Whether every byte of a checkpoint is as it was written."""
    return is_whole_folder(path) if path.is_dir() else digest_of(path) is not None


def newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[int, Path] | None:
    """The newest checkpoint that is whole, None where there is none; each damaged one is said through `say`."""
    for samples, path in list_checkpoints(folder):
        if is_whole(path):
            return samples, path
        say(f"{path} is damaged; falling back to the checkpoint before it")
    return None
