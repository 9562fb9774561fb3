"""`sparsepilot.load`: this project's dictionaries and those of other tools, from a folder, a file or a hub id."""

from __future__ import annotations

from pathlib import Path

from sparsepilot.errors import CheckpointError
from sparsepilot.interop import dictionary, hub
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.interop.formats import FORMATS


def load(path: str | Path) -> Dictionary:
    """A trained dictionary as a plain module for raw activations, in fp32.

    Args:
        path: a run folder; a folder, or a file in one, of this project's format or of one in `formats.FORMATS`; or
            `hf:<owner>/<repository>[@revision]/<folder or file>`, which needs huggingface_hub.

    Raises:
        CheckpointError: when there is nothing to load, or a file is missing, damaged, of an unknown format or has
            tensors of the wrong shape. No file can run code.
    """
    if str(path).startswith(hub.PREFIX):
        path = hub.fetch(str(path), _files)
    given = Path(path)
    folder, file = (given.parent, given.name) if given.is_file() else (given, None)
    if not folder.is_dir():
        raise CheckpointError(f"{given}: there is no such file or folder")
    names = {entry.name for entry in folder.iterdir()}
    if file is not None:
        _check_named(folder, names, file)
    own = sorted(name for name in names if (folder / name / dictionary.CONFIG).is_file())
    if own and "metrics.jsonl" in names:
        raise CheckpointError(
            f"{folder}: holds several dictionaries; load one of {', '.join(str(folder / name) for name in own)}"
        )
    damaged = dictionary.TENSORS in names and "cfg.json" not in names  # sparsify's is called like that, too
    if dictionary.CONFIG in names or {"config.yaml", "metrics.jsonl"} <= names or damaged:
        return dictionary.load(folder)
    try:
        format_name = _format_of(names, file)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if format_name is None:
        there = ", ".join(sorted(names)[:8]) or "nothing"
        raise CheckpointError(
            f"{folder}: holds {there}; a run folder whose training has ended, or a dictionary of one of "
            f"{', '.join(FORMATS)} is needed"
        )
    return _read(format_name, folder, file)


def _read(format_name: str, folder: Path, file: str | None) -> Dictionary:
    """Reads a stranger's files: of what their numbers and types can be, a format's reader need not think of all."""
    try:
        return FORMATS[format_name].read(folder, file)
    except CheckpointError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{folder}: is no dictionary that {format_name} could have written ({said})") from error


def _check_named(folder: Path, names: set[str], file: str) -> None:
    """CheckpointError unless a file that was named is one of those that are read."""
    try:
        if file in (dictionary.CONFIG, dictionary.TENSORS) or file in _files(names, file):
            return
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    raise CheckpointError(
        f"{folder / file}: is no file of a dictionary that is known by its name; name the folder, or another file"
    )


def _format_of(names: set[str], file: str | None) -> str | None:
    return next((name for name, format in FORMATS.items() if format.files(names, file)), None)


def _files(names: set[str], file: str | None) -> list[str]:
    """The files to read in a folder with these names; empty where nothing here is known."""
    own = {dictionary.CONFIG, dictionary.TENSORS}
    if own <= names:
        return sorted(own)
    found = _format_of(names, file)
    return [] if found is None else FORMATS[found].files(names, file)
