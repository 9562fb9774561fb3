"""Files that are either whole or not there: temporary file, fsync, rename, fsync of the folder.

zarr's own LocalStore renames but never flushes, so a power cut can leave a renamed file without its bytes; and JSON
has no checksum of its own. Both matter here because a file's presence is what says "this shard is whole".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsepilot import faults
from sparsepilot.errors import DataError
from sparsepilot.run_folder import sync_folder


def write_durably(path: Path, data: bytes | bytearray | memoryview, fault: str | None = None) -> None:
    """Writes `data` to `path` so that after a crash at any instant the path holds the old file, the new one or none.

    `fault` names a fault point that is passed when the bytes are on disk but not yet under their name.
    Raises OSError (disk full, quota, permissions) after removing what it had begun.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each attempt: two writers started by mistake on one shard must not share a temporary file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if fault is not None:
            faults.point(fault)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_partials(path: Path) -> None:
    """Removes what killed writers left of `path`; other files of its folder may be in the making just now."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses is a DataError about `path`: a folder without permission, a name that cannot be."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def canonical_json(value: Any) -> bytes:
    """The one text of a JSON value: sorted keys, no spaces; floats keep all their digits."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` durably with its own checksum beside it."""
    body = canonical_json(content)
    write_durably(path, canonical_json({"sha256": sha256(body), "content": content}))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; DataError when it is not that any more."""
    try:
        whole = json.loads(path.read_bytes())
        content: dict[str, Any] = whole["content"]
        expected = whole["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged, it does not parse ({error}); write this cache again") from error
    if sha256(canonical_json(content)) != expected:
        raise DataError(f"{path}: damaged, its checksum does not match its content; write this cache again")
    return content


@contextlib.contextmanager
def one_at_a_time(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Of several processes that want to make `path` alone, one is here; the others wait, after they have said so.

    The system lets go of the lock with its holder, however that ends. Where a filesystem has no locks, or nothing can
    be written, there is none.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
