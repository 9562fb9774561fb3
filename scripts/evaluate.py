"""Evaluates trained dictionaries on the held-out text of their caches, in their language models.

python scripts/evaluate.py run_dir=runs/mine               # writes evaluation.json and evaluation_latents.json there
python scripts/evaluate.py 'run_dir=[runs/a,runs/b]'       # a row each; wildcards, too: 'run_dir=runs/sweep/*'
python scripts/evaluate.py run_dir=exports/mine cache=cache/demo lm.id=... out=results/mine    # what `load` reads

tokens=10000 (of the language model's predictions, at least; null: all), rows=100000 (of the cache, at most; null:
all), batch_contexts=4; lm=none leaves the language model out, lm.dtype=... and so on take the place of the run's own;
cache=... is another cache. site=... is the cache's name of a dictionary's site, where its file has a name that says
nothing here (of a transcoder site=[<read>,<write>]). out=... is a folder for the results, with one below it for each of
several runs. docs/evaluation.md says what each figure means.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsepilot.config.cli import arguments, run_paths, user_errors
from sparsepilot.errors import ConfigError
from sparsepilot.process_memory import keep_freed_memory
from sparsepilot.run_folder import make_folder

FIELDS: dict[str, Any] = {
    "run_dir": "???", "cache": None, "lm": None, "tokens": 10_000, "rows": 100_000, "batch_contexts": 4, "out": None,
    "site": None,
}  # fmt: skip
COLUMNS: dict[str, tuple[str, str, str]] = {
    "L0": ("rows", "l0", ".2f"),
    "FVU": ("rows", "fvu", ".4f"),
    "with special tokens": ("with_special_tokens", "fvu", ".4f"),
    "cosine": ("rows", "cosine", ".4f"),
    "norm ratio": ("rows", "norm_ratio", ".4f"),
    "CE": ("language_model", "ce", ".4f"),
    "clean CE": ("language_model", "ce_clean", ".4f"),
    "CE recovered": ("language_model", "ce_recovered", ".2%"),
    "KL": ("language_model", "kl", ".4f"),
    "inactive": ("latents", "inactive", ",d"),
    "dead": ("latents", "dead", ",d"),
    "dense": ("latents", "dense", ",d"),
    "latents": ("latents", "d_sae", ",d"),
}
"""Heading -> where its figure is in evaluation.json, and how it is written."""


def main() -> None:
    """Reads field=value from the command line."""
    from sparsepilot.analysis.evaluate import evaluate, open_subject, write_evaluation

    cfg = arguments(sys.argv[1:], FIELDS, lists=("run_dir",))
    paths = run_paths(cfg["run_dir"])
    keep_freed_memory()
    subjects = [open_subject(path, cfg["cache"], cfg["lm"], cfg["site"]) for path in paths]
    folders = _folders(paths, cfg["out"])
    for folder in folders:
        make_folder(folder)  # before anything is measured
    console = Console(stderr=True)
    sizes = {name: cfg[name] for name in ("tokens", "rows", "batch_contexts")}
    found, loaded = [], {}
    for subject, folder in zip(subjects, folders, strict=True):
        with console.status(subject.name) as status:
            figures, each = evaluate(
                subject, **sizes, language_models=loaded, say=lambda line, s=subject: status.update(f"{s.name}: {line}")
            )
        write_evaluation(folder, figures, each)
        found.append(figures)
    out = Console(width=None if sys.stdout.isatty() else 200)
    out.print(_table(found))
    for folder in folders:
        print(folder / "evaluation.json")


def _table(found: list[dict[str, Any]]) -> Table:
    """A row for each run; with one run, a row for each figure."""
    names = [h for h, (section, name, _) in COLUMNS.items() if any(name in one.get(section, {}) for one in found)]
    texts = [[_text(one, heading) for heading in names] for one in found]
    if len(found) == 1:
        table = Table(title=found[0]["run"], show_header=False, title_justify="left")
        for row in zip(names, texts[0], strict=True):
            table.add_row(*row)
        return table
    table = Table("run", *names)
    for one, row in zip(found, texts, strict=True):
        table.add_row(one["run"], *row)
    return table


def _text(one: dict[str, Any], heading: str) -> str:
    section, name, form = COLUMNS[heading]
    value = one.get(section, {}).get(name)
    return "-" if value is None else format(value, form)


def _folders(paths: list[str], out: str | None) -> list[Path]:
    """Where each run's results go."""
    if out is None:
        for path in paths:
            if not Path(path).is_dir():
                raise ConfigError(f"run_dir = {path}: is no folder to write into; give out=...")
        return [Path(path) for path in paths]
    if len(paths) == 1:
        return [Path(out)]
    names = [Path(path).name for path in paths]
    return [Path(out) / (name if names.count(name) == 1 else f"{i}-{name}") for i, name in enumerate(names)]


if __name__ == "__main__":
    with user_errors():
        main()
