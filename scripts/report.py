"""Draws a run: python scripts/report.py run_dir=runs/...; writes overview.png into the run folder."""

from __future__ import annotations

import sys

from sparsepilot.config.cli import arguments, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.reporting.pictures import draw_overview
from sparsepilot.run_folder import RunFolder


def main() -> None:
    """Reads run_dir=... from the command line."""
    cfg = arguments(sys.argv[1:], {"run_dir": "???"})
    folder = RunFolder(cfg["run_dir"])
    if not folder.metrics.exists():
        raise ConfigError(f"run_dir = {cfg['run_dir']}: there is no run here (no metrics.jsonl)")
    print(draw_overview(folder))


if __name__ == "__main__":
    with user_errors():
        main()
