"""Prepares a folder to publish:

    python scripts/publish.py run_dir=runs/mine out=published/mine 'formats=[saelens]' hub=me/mine license=mit

It holds sae.safetensors and sae.json, a model card (README.md) with the metrics of summary.json and how to load it, and
for each of `formats` a folder in that format. `hub` is the name that it will have; nothing is uploaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sparsepilot.config.cli import arguments, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.interop.formats.refuse import Names
from sparsepilot.reporting.publishing import publish

FIELDS = {
    "run_dir": "???", "out": "???", "formats": [], "hub": None, "license": None, "hook": None, "hook_out": None,
}  # fmt: skip


def main() -> None:
    """Reads field=value from the command line."""
    cfg = arguments(sys.argv[1:], FIELDS)
    if not isinstance(cfg["formats"], list):
        raise ConfigError(f"formats = {cfg['formats']}: a list is needed, formats=[{cfg['formats']}]")
    names = Names(cfg["hook"], cfg["hook_out"])
    print(publish(cfg["run_dir"], Path(cfg["out"]), cfg["formats"], cfg["hub"], cfg["license"], names))


if __name__ == "__main__":
    with user_errors():
        main()
