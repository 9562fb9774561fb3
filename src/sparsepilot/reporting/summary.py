"""What a person reads at the end of a run, and before one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsepilot.reporting.page import PAGE
from sparsepilot.run_folder import RunFolder


def print_end(console: Console, folder: RunFolder, summary: Mapping[str, Any], d_sae: int, command: str) -> None:
    """The result table and what to try next; `command` is the one that the user gave."""
    metrics = summary["metrics"]
    table = Table(title="result", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("L0 (validation)", _number(metrics.get("val/l0"))),
        ("FVU (validation)", _number(metrics.get("val/fvu"))),
        ("dead latents", f"{metrics.get('train/dead_latents', 0):,} of {d_sae:,}"),
        ("silent over a whole pass", f"{metrics['val/silent_latents']:,}" if "val/silent_latents" in metrics else "-"),
        ("samples", f"{summary['samples']:,}"),
        ("samples/s", f"{summary['samples_per_s']:,.0f}"),
        ("run folder", str(folder.path)),
    ]
    if (folder.report / PAGE).exists():
        rows.append(("report", str(folder.report / PAGE)))
    if "val/recovery" in metrics:
        rows.insert(2, ("planted features recovered", f"mean cosine {metrics['val/recovery']:.3f}"))
    if "val/ce" in metrics:
        rows.insert(2, ("cross-entropy (validation)", _cross_entropy(metrics)))
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    python = command.partition(" ")[0]
    console.print(
        "next:\n"
        f"  {command} run_dir={folder.path} samples={2 * summary['samples']}   # train it for longer\n"
        f"  {command} model.d_sae={2 * d_sae}   # a dictionary twice as wide on the same cache\n"
        f"  {python} scripts/report.py 'run_dir=[{folder.path},...]'   # draw it beside others\n"
        f"  {python} -c \"import sparsepilot; print(sparsepilot.load('{folder.path}'))\"   # use it",
        highlight=False,
        markup=False,
    )


def print_sizes(console: Console, sizes: Mapping[str, str]) -> None:
    """The table of `check=true`."""
    table = Table(title="check passed", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in sizes.items():
        table.add_row(name, value)
    console.print(table)


def _cross_entropy(metrics: Mapping[str, Any]) -> str:
    text = f"{metrics['val/ce']:.4f}, clean {metrics['val/ce_clean']:.4f}"
    if "val/ce_recovered" in metrics:
        text += f", {metrics['val/ce_recovered']:.1%} recovered"
    return text


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
