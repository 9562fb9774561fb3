"""A report of one run or of several: every picture as PNG and SVG, and one page with all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparsepilot.reporting import labels
from sparsepilot.reporting.as_image import write_images
from sparsepilot.reporting.figure import Picture
from sparsepilot.reporting.overlay import overlay
from sparsepilot.reporting.page import PAGE, write_page
from sparsepilot.reporting.pictures import registered
from sparsepilot.reporting.runs import Run, read_runs
from sparsepilot.reporting.tables import Table
from sparsepilot.run_folder import RunFolder


def write_report(folders: Sequence[RunFolder], out: Path) -> Path:
    """Draws every picture of one run, or of several over one another, into `out`; returns the page.

    Raises:
        ConfigError: where a folder holds no run.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    names = labels.labels(runs)
    return write_pictures(draw_pictures(runs, names), runs, names, out)


def draw_pictures(runs: Sequence[Run], names: Sequence[str]) -> list[Picture]:
    """Every registered picture of these runs."""
    return [overlay([draw(run) for run in runs], names) for draw in registered()]


def write_pictures(
    pictures: Sequence[Picture],
    runs: Sequence[Run],
    names: Sequence[str],
    out: Path,
    table: Table | None = None,
    title: str | None = None,
) -> Path:
    """Writes `<picture>.png`, `<picture>.svg` and the page; returns the page.

    Args:
        pictures: to write.
        runs: that they are of, if any.
        names: of the runs.
        out: the folder.
        table: what the page says about the runs instead of their results.
        title: of the page; by default the run's name, or how many there are.
    """
    out.mkdir(parents=True, exist_ok=True)
    subtitle = title or (labels.title(runs, names) if runs else "")
    for picture in pictures:
        write_images(picture, out, subtitle)
    return write_page(pictures, runs, names, out / PAGE, table, title)


def report_or_say(folder: RunFolder, say: Callable[[str], None]) -> None:
    """The report at the end of a run. Whatever goes wrong is said in one line: no run is lost for a picture."""
    try:
        write_report([folder], folder.report)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"warning: no report: {reason}; `python scripts/report.py run_dir={folder.path}` tries again")
