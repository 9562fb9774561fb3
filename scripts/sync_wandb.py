"""Builds one clean W&B run from a run folder: python scripts/sync_wandb.py run_dir=runs/... [mode=online]

Online (where you are logged in) it sends the steps that the server lacks; offline it writes <run>/wandb anew.
"""

from __future__ import annotations

import sys

from sparsepilot.config.cli import arguments, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.reporting.report import report_or_say
from sparsepilot.reporting.wandb import LiveRun, resolve_mode, write_offline_run
from sparsepilot.run_folder import RunFolder
from sparsepilot.saved import read_config

DEFAULTS = {"project": "sparsepilot", "entity": None, "group": None, "tags": []}


def main() -> None:
    """Reads run_dir=... and mode=... from the command line."""
    cfg = arguments(sys.argv[1:], {"run_dir": "???", "mode": "auto"})
    folder = RunFolder(cfg["run_dir"])
    if not folder.exists():
        raise ConfigError(f"run_dir = {cfg['run_dir']}: there is no run here (no config.yaml)")
    if not folder.identity.exists():
        raise ConfigError(f"run_dir = {folder.path}: is one of several trainees; give the run, {folder.path.parent}")
    saved = read_config(folder).get("logger") or {}
    settings = {**DEFAULTS, **(saved.get("wandb") or {})}
    report_or_say(folder, print)  # of all the rows that go there now
    if resolve_mode(cfg["mode"]) == "online":
        live = LiveRun(folder, settings)
        live.after_checkpoint(samples=sys.maxsize)
        live.add_pictures()
        live.close()
    else:
        write_offline_run(folder, settings)
        print(f"wrote {folder.path / 'wandb'}; send it with: wandb sync {folder.path / 'wandb'}/offline-run-*")


if __name__ == "__main__":
    with user_errors():
        main()
