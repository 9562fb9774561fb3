"""Writes a run's dictionary in another tool's format:

    python scripts/export.py run_dir=runs/mine format=saelens out=exports/mine

format: saelens, sparsify, dictionary_learning, circuit_tracer (docs/formats.md says what each can hold). run_dir may be
anything that sparsepilot.load reads, and for circuit_tracer a list of transcoders, one per layer:
'run_dir=[runs/layer0,runs/layer1]'. hook=... and hook_out=... name the places that are read and written as the other
tool does, where our names of them do not say it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sparsepilot.config.cli import arguments, user_errors
from sparsepilot.interop.export import export
from sparsepilot.interop.formats.refuse import Names
from sparsepilot.interop.load import load


def main() -> None:
    """Reads field=value from the command line."""
    cfg = arguments(
        sys.argv[1:],
        {"run_dir": "???", "format": "???", "out": "???", "hook": None, "hook_out": None},
        lists=("run_dir",),
    )
    runs = cfg["run_dir"] if isinstance(cfg["run_dir"], list) else [cfg["run_dir"]]
    out = Path(cfg["out"])
    written = export([load(run) for run in runs], cfg["format"], out, Names(cfg["hook"], cfg["hook_out"]))
    for note in written.notes:
        print(f"note: {note}")
    folder = out / written.folder
    print(folder)
    print(written.how.replace("{folder}", str(folder)))


if __name__ == "__main__":
    with user_errors():
        main()
