"""A private folder of models unpacked from GGUF: unpacking takes ten times as long as reading the result.

The folder is `$XDG_CACHE_HOME/sparsepilot/lm` (`~/.cache/...` by default). An entry's name is the hash of the file it
came from and the dtype, so it never goes stale; it carries a hash of its own weights, so a damaged one is not used;
it appears by one rename, so a half-written one is not seen. Any of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_SEAL = "SHA256"


def folder_of_all() -> Path:
    """Where the unpacked models lie."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sparsepilot" / "lm"


def find(key: str) -> Path | None:
    """The folder of the unpacked model, or None when there is none that is whole."""
    folder = folder_of_all() / key
    try:
        sealed = (folder / _SEAL).read_text()
        whole = sealed == _digest(folder)
    except OSError:
        return None
    return folder if whole else None


def keep(key: str, model: Any, tokenizer: Any) -> None:
    """Saves an unpacked model. Keeping is a convenience: a disk that is full or read-only is no error."""
    target = folder_of_all() / key
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=target.parent))
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / _SEAL).write_text(_digest(scratch))
        if target.exists():
            shutil.rmtree(target, ignore_errors=True)  # `find` refused it: damaged
        os.rename(scratch, target)
    except OSError:
        pass
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.name != _SEAL):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
