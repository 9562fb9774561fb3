"""Draws runs and schedules, as PNG, SVG and one page that opens without a network.

python scripts/report.py run_dir=runs/mine                      # into runs/mine/report/
python scripts/report.py 'run_dir=[runs/a,runs/b]' [out=...]     # one colour per run; 'run_dir=runs/sweep/*', too
python scripts/report.py sweep_dir=runs/sweeps/seeds-...         # a table of a sweep's members (also CSV), frontier
python scripts/report.py schedule=reference [samples=...] [out=...]   # a learning rate that nobody has run
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from sparsepilot.config.cli import arguments, run_paths, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.run_folder import RunFolder
from sparsepilot.sweep_folder import SweepFolder

CONF = Path(__file__).resolve().parents[1] / "conf"
COMPARISON, SCHEDULES = Path("runs/reports/comparison"), Path("runs/reports")


def main() -> None:
    """Reads run_dir=..., sweep_dir=... or schedule=... from the command line."""
    if any(argument.startswith("schedule=") for argument in sys.argv[1:]):
        print(draw_schedule(sys.argv[1:]))
        return
    from sparsepilot.reporting.report import write_report
    from sparsepilot.reporting.sweep import write_sweep_report

    cfg = arguments(sys.argv[1:], {"run_dir": None, "sweep_dir": None, "out": None}, lists=("run_dir",))
    if cfg["run_dir"] is None and cfg["sweep_dir"] is None:
        raise ConfigError("run_dir: missing; set run_dir=..., or sweep_dir=... of a sweep")
    if cfg["sweep_dir"] is not None or SweepFolder(str(cfg["run_dir"])).exists():
        sweep = SweepFolder(cfg["sweep_dir"] or cfg["run_dir"])
        print(write_sweep_report(sweep, Path(cfg["out"] or sweep.report)))
        return
    folders = [RunFolder(path) for path in run_paths(cfg["run_dir"])]
    print(write_report(folders, Path(cfg["out"] or (folders[0].report if len(folders) == 1 else COMPARISON))))


def draw_schedule(given: list[str]) -> Path:
    """The fifth picture from the configuration alone; every field of a training configuration may be given."""
    from hydra import compose, initialize_config_dir

    from sparsepilot.config.instantiate import instantiate
    from sparsepilot.config.resolvers import register_resolvers
    from sparsepilot.config.schema import register
    from sparsepilot.config.signature import check_target
    from sparsepilot.reporting.pictures.learning_rate import draw_schedule as draw
    from sparsepilot.reporting.report import write_pictures

    ours = arguments([a for a in given if a.startswith("out=")], {"out": None})
    overrides = [a for a in given if not a.startswith("out=")]
    name = next(a.partition("=")[2] for a in overrides if a.startswith("schedule="))
    register()
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=overrides)
    check_target("schedule", cfg.schedule, given=("samples", "total_samples"))
    schedule = instantiate(cfg.schedule, _convert_="all")
    samples = int(cfg.samples)
    breakpoints = inspect.signature(schedule).parameters.get("breakpoints")
    says_budget = any(a.lstrip("+").startswith(("samples=", "experiment=")) for a in overrides)
    if breakpoints is not None and not says_budget:
        samples = int(breakpoints.default[-1][0])  # all of it
    out = Path(ours["out"] or SCHEDULES / f"schedule-{name}")
    return write_pictures([draw(schedule, samples, name)], [], [], out)


if __name__ == "__main__":
    with user_errors():
        main()
