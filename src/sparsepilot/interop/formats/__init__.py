"""The formats of other tools, one file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.interop.formats import circuit_tracer, dictionary_learning, gemma_scope, saelens, sparsify
from sparsepilot.interop.formats.refuse import Holds, Names, Written


class Format(NamedTuple):
    """What can be done with a format."""

    files: Callable[[set[str], str | None], list[str]]
    """from the names in a folder, and the one that was asked for: those to read; empty where it is another format"""
    read: Callable[[Path, str | None], Dictionary]
    write: Callable[[Dictionary, Path, Names], Written] | None
    holds: Holds


FORMATS = {
    "saelens": Format(saelens.files, saelens.read, saelens.write, saelens.HOLDS),
    "sparsify": Format(sparsify.files, sparsify.read, sparsify.write, sparsify.HOLDS),
    "dictionary_learning": Format(
        dictionary_learning.files, dictionary_learning.read, dictionary_learning.write, dictionary_learning.HOLDS
    ),
    "circuit_tracer": Format(circuit_tracer.files, circuit_tracer.read, circuit_tracer.write, circuit_tracer.HOLDS),
    "gemma_scope": Format(gemma_scope.files, gemma_scope.read, None, {}),
}
WRITABLE = [name for name, format in FORMATS.items() if format.write is not None]
