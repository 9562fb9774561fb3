"""Writing a dictionary in another tool's format, all or nothing."""

from __future__ import annotations

from pathlib import Path

from sparsepilot.errors import ConfigError, nearest
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.interop.files import new_folder
from sparsepilot.interop.formats import FORMATS, WRITABLE, circuit_tracer
from sparsepilot.interop.formats.refuse import Names, Written


def export(saes: list[Dictionary], format: str, out: Path, names: Names | None = None) -> Written:
    """Writes one dictionary, or for circuit_tracer the transcoders of several layers, into the new folder `out`.

    Args:
        saes: what to write.
        format: one of WRITABLE.
        out: a folder that is not there yet, or empty.
        names: what the user calls the places that are read and written, where our names do not say it.

    Raises:
        ConfigError: when there is no such format, it cannot hold a dictionary, or `out` is not empty; nothing is left.
    """
    write = FORMATS[format].write if format in FORMATS else None
    if write is None:
        raise ConfigError(f"format = {format}: there is no such format to write; {nearest(format, WRITABLE)}")
    if len(saes) > 1 and format != "circuit_tracer":
        raise ConfigError(f"run_dir: {len(saes)} runs were given; {format} takes one, only circuit_tracer's sets more")
    with new_folder(out) as folder:
        if len(saes) > 1:
            return circuit_tracer.write_set(saes, folder, names or Names())
        return write(saes[0], folder, names or Names())
