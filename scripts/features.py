"""Describes every latent of a trained dictionary, in a page that opens from the file system:

    python scripts/features.py run_dir=runs/mine           # into runs/mine/features/

out=... puts it elsewhere, cache=... reads another cache of the same model and sites, rows=... only the first so many
rows, seed=... draws other latents of the 200 with the highest score to open the page with. Stopped and started again it
goes on from its last save (every save_every_s seconds).
"""

from __future__ import annotations

import sys

from sparsepilot.config.cli import arguments, user_errors

FIELDS = {"run_dir": "???", "out": None, "cache": None, "rows": None, "seed": 0, "save_every_s": 20}


def main() -> None:
    """Reads field=value from the command line."""
    cfg = arguments(sys.argv[1:], FIELDS)
    from sparsepilot.analysis.features.build import build

    print(build(**cfg))


if __name__ == "__main__":
    with user_errors():
        main()
