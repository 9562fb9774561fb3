"""Dictionaries on a model hub, `hf:<owner>/<repository>[@revision]/<folder or file>`: only the files needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from sparsepilot.errors import CheckpointError

PREFIX = "hf:"


def fetch(reference: str, files: Callable[[set[str], str | None], list[str]], hub: Any = None) -> Path:
    """Downloads what reading needs into the hub's own cache.

    Args:
        reference: as above; a revision has no slash.
        files: from the names in a folder, and the file that was asked for, those to download.
        hub: stands in for huggingface_hub.

    Returns:
        The folder or file on this machine.

    Raises:
        CheckpointError: naming what is wrong: the reference, the hub, or what lies there.
    """
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*?))?/*", reference)
    if found is None or ".." in (found[3] or "").split("/"):
        raise CheckpointError(
            f"{reference}: is no hub id; hf:<owner>/<repository>[@revision]/<folder or file> is needed"
        )
    repo, revision, inside = found[1], found[2], found[3] or ""
    if hub is None:
        try:
            hub = import_module("huggingface_hub")
        except ImportError as error:
            raise CheckpointError(f"{reference}: needs huggingface_hub; pip install huggingface_hub") from error
    try:
        paths = _list(hub, repo, revision)
        file = inside.rpartition("/")[2] if inside in paths else None
        folder = inside.rpartition("/")[0] if file is not None else inside
        prefix = folder + "/" if folder else ""
        names = {path[len(prefix) :] for path in paths if path.startswith(prefix)}
        names = {name for name in names if "/" not in name}
        needed = files(names, file)
        if file is not None and file not in needed:  # its neighbours are not what was asked for
            names, needed = {file}, []
        got = [Path(hub.hf_hub_download(repo, prefix + name, revision=revision)) for name in needed]
    except CheckpointError as error:
        raise CheckpointError(f"{reference}: {error}") from error
    except Exception as error:  # of the network, the hub and its client, each with errors of its own
        raise CheckpointError(f"{reference}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
    if not got:
        there = ", ".join(sorted(names)[:8]) or "nothing"
        raise CheckpointError(f"{reference}: holds {there}; no dictionary of a known format")
    return got[0] if file is not None else got[0].parent


def _list(hub: Any, repo: str, revision: str | None) -> list[str]:
    """All files of a repository; where the hub cannot be reached, those of its copy on this machine."""
    try:
        return list(hub.list_repo_files(repo, revision=revision))
    except Exception:
        try:
            copy = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            copy = None
        if copy is None:
            raise
        return [path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()]
