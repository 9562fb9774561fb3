"""What a person reads at the end of a run, and before one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsepilot.metrics.dead import dead_window_samples
from sparsepilot.reporting.page import PAGE
from sparsepilot.reporting.ticks import samples_text, with_error
from sparsepilot.run_folder import RunFolder


def print_end(
    console: Console, folder: RunFolder, summary: Mapping[str, Any], widths: Mapping[str, int], command: str
) -> None:
    """The result table and what to try next.

    Args:
        console: where to.
        folder: of the run.
        summary: of the run.
        widths: latents of each trainee, by the prefix of its metrics.
        command: the one that the user gave.
    """
    metrics = summary["metrics"]
    own = {
        prefix: {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        for prefix in widths
    }
    several = len(widths) > 1
    table = Table(title="result", show_header=several, title_justify="left")
    table.add_column(style="bold")
    for prefix in widths:
        table.add_column(prefix.rstrip("/"))
    window = samples_text(dead_window_samples(summary["samples"]))
    each = [_results(own[prefix], d_sae, window) for prefix, d_sae in widths.items()]
    for name in dict.fromkeys(name for results in each for name in results):
        table.add_row(name, *(results.get(name, "-") for results in each))
    rows = [
        ("samples", f"{summary['samples']:,}"),
        ("samples/s", f"{summary['samples_per_s']:,.0f}"),
        ("run folder", str(folder.path)),
    ]
    if (folder.report / PAGE).exists():
        rows.append(("report", str(folder.report / PAGE)))
    for row in rows:
        if not several:
            table.add_row(*row)
    console.print(table)
    for name, value in rows:
        if several:
            console.print(f"{name}: {value}", highlight=False)
    python = command.partition(" ")[0]
    first, d_sae = next(iter(widths.items()))
    wider = f"  {command} model.d_sae={2 * d_sae}   # a dictionary twice as wide on the same cache\n"
    saved = folder.of_trainee(first.rstrip("/")).path if several else folder.path
    console.print(
        "next:\n"
        f"  {command} run_dir={folder.path} samples={2 * summary['samples']}   # train it for longer\n"
        f"{'' if several else wider}"
        f"  {python} scripts/report.py 'run_dir=[{folder.path},...]'   # draw it beside others\n"
        f"  {python} -c \"import sparsepilot; print(sparsepilot.load('{saved}'))\"   # use it",
        highlight=False,
        markup=False,
    )


def _results(metrics: Mapping[str, Any], d_sae: int, window: str) -> dict[str, str]:
    """What is told of one dictionary."""
    silent = metrics.get("val/silent_latents")
    rows = {"L0 (validation)": _number(metrics.get("val/l0")), "FVU (validation)": _number(metrics.get("val/fvu"))}
    if "val/ce" in metrics:
        rows["cross-entropy (validation)"] = _cross_entropy(metrics)
    if "val/recovery" in metrics:
        rows["planted features recovered"] = f"mean cosine {metrics['val/recovery']:.3f}"
    rows["dead latents"] = f"{metrics.get('train/dead_latents', 0):,} of {d_sae:,} (silent for {window} samples)"
    rows["silent over a whole pass"] = "-" if silent is None else f"{silent:,}"
    return rows


def print_sizes(console: Console, sizes: Mapping[str, str]) -> None:
    """The table of `check=true`."""
    table = Table(title="check passed", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in sizes.items():
        table.add_row(name, value)
    console.print(table)


def _cross_entropy(metrics: Mapping[str, Any]) -> str:
    text = f"{with_error(metrics['val/ce'], metrics.get('val/ce_se'))}, clean {metrics['val/ce_clean']:.4f}"
    if "val/ce_recovered" in metrics:
        text += f", {metrics['val/ce_recovered']:.1%} recovered"
    return text


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
