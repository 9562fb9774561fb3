"""A folder to publish: the dictionary, the same for other tools, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsepilot.errors import ConfigError, nearest
from sparsepilot.interop import dictionary
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.interop.export import export
from sparsepilot.interop.files import new_folder
from sparsepilot.interop.formats import FORMATS, WRITABLE
from sparsepilot.interop.formats.refuse import Names, Written, kind_of
from sparsepilot.interop.load import load
from sparsepilot.interop.names import model_of
from sparsepilot.run_folder import RunFolder, replacing
from sparsepilot.saved import read_summary

CARD = "README.md"
PUBLIC = ("context_length", "model_dtype", "model_revision", "num_documents", "tokenizer", "tokenizer_hash")
"""What of a cache's source is anybody's business; the rest may name folders of the machine that it was made on."""
METRICS = {
    "val/l0": "L0, active latents per row",
    "val/fvu": "FVU, about the mean of the data",
    "val/mse": "squared error per row and column, of raw activations",
    "val/ce_recovered": "cross-entropy recovered",
    "val/silent_latents": "latents silent over a pass over the training rows and on all validation rows",
    "train/dead_latents": "dead latents at the end of training",
    "val/recovery": "mean cosine to the planted features",
}


def publish(
    run_dir: str, out: Path, formats: Sequence[str], hub: str | None = None, license: str | None = None,
    names: Names | None = None,
) -> Path:  # fmt: skip
    """Writes sae.safetensors, sae.json, README.md, and a folder for each of `formats`, all or nothing.

    Args:
        run_dir: a run whose training has ended, or anything else that `load` reads; metrics come from its summary.json.
        out: a folder that is not there yet, or empty.
        formats: of WRITABLE.
        hub: owner/repository that it will have, for the card's commands.
        license: its name on the hub, for the card.
        names: what the user calls the places that are read and written, where our names do not say it.

    Returns:
        The model card.

    Raises:
        CheckpointError, ConfigError: when there is nothing to load, or a format cannot hold it; nothing is left.
    """
    for format in formats:
        if format not in WRITABLE:
            raise ConfigError(f"formats = {list(formats)}: there is no {format}; {nearest(format, WRITABLE)}")
    sae = load(run_dir)
    summary = read_summary(RunFolder(run_dir))
    cfg = public_config(sae.cfg)
    with new_folder(out) as folder:
        dictionary.save(folder, cfg, sae.tensors())
        written = {format: export([sae], format, folder / format, names) for format in formats}
        with replacing(folder / CARD) as file:
            file.write(card(sae, summary, written, hub, license))
    return out / CARD


def public_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """sae.json without what names the machine that a dictionary was made on."""
    public = {name: value for name, value in cfg.items() if name not in ("format", "source")}
    source = cfg.get("source")
    if isinstance(source, dict):
        public["source"] = {name: source[name] for name in PUBLIC if name in source} | {"model_id": model_of(dict(cfg))}
        if isinstance(source.get("text"), dict):
            public["source"]["text"] = {"source": source["text"].get("source")}
    return public


def card(
    sae: Dictionary, summary: Mapping[str, Any], written: Mapping[str, Written], hub: str | None, license: str | None
) -> str:
    """The model card, Markdown with the hub's header."""
    cfg, model = sae.cfg, model_of(sae.cfg)
    kind = kind_of(cfg).replace("_", " ")
    sites = {field: ", ".join(f"`{site}`" for site in cfg.get(field) or []) for field in ("sites", "sites_out")}
    header = {
        "library_name": "sparsepilot",
        "base_model": model if model and model.count("/") == 1 else None,
        "license": license,
        "tags": ["sparse-autoencoder", "interpretability", cfg["architecture"]],
    }
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in header.items() if value), "---", ""]
    lines += [f"# {cfg['architecture']} {kind}, {cfg['d_sae']:,} latents" + (f", on {model}" if model else ""), ""]
    rows = {
        "reads": f"{sites['sites'] or 'not known'}, {cfg['d_in']} columns, raw activations",
        "writes": f"{sites['sites_out'] or 'not known'}, {cfg['d_out']} columns",
        "k": cfg.get("k"),
        "trained on": f"{cfg['samples']:,} rows" if isinstance(cfg.get("samples"), int) else None,
        **_text(cfg),
        "imported from": (cfg.get("imported") or {}).get("format"),
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value), ""]
    metrics = summary.get("metrics", {})
    measured = [f"| {what} | {metrics[name]:.4g} |" for name, what in METRICS.items() if _is_number(metrics.get(name))]
    lines += ["## Measured on held-out rows", ""]
    lines += ["| | |", "|---|---|", *measured, ""] if measured else ["Nothing was measured here.", ""]
    where = f"hf:{hub}" if hub else "path/to/this/folder"
    lines += ["## Load it", "", *_code(f'import sparsepilot\n\nsae = sparsepilot.load("{where}")\n' + _USE), ""]
    for format, found in written.items():
        at = f"{hub.rpartition('/')[2] if hub else 'path/to/this/folder'}/{format}"
        how = found.how.replace("{folder}", f"{at}/{found.folder}".rstrip("/"))
        lines += [f"With the code of {format}, from a copy of this repository:", "", *_code(how), ""]
        lines += [f"({note})\n" for note in found.notes]
    others = [name for name in able(sae) if name not in written]
    if others:
        lines += [
            f"{', '.join(others)} can hold it, too: `python scripts/export.py run_dir=<this folder> "
            f"format={others[0]} out=<folder>`.",
            "",
        ]
    environment = summary.get("environment", {})
    if environment:
        made = ", ".join(
            f"{name} {environment[name]}" for name in ("sparsepilot", "torch", "python") if name in environment
        )
        lines += [f"Trained with {made}.", ""]
    return "\n".join(lines)


_USE = "codes = sae.encode(activations)      # [..., d_in] -> [..., d_sae]\nreconstruction = sae(activations)"


def able(sae: Dictionary) -> list[str]:
    """The formats that can hold a dictionary of this kind and architecture."""
    return [name for name in WRITABLE if sae.cfg["architecture"] in FORMATS[name].holds.get(kind_of(sae.cfg), ())]


def _text(cfg: Mapping[str, Any]) -> dict[str, Any]:
    source = cfg.get("source") if isinstance(cfg.get("source"), dict) else {}
    assert source is not None
    text = source.get("text")
    return {
        "text": text.get("source") if isinstance(text, dict) else None,
        "context length": source.get("context_length"),
    }


def _code(text: str) -> list[str]:
    return ["```python", *text.rstrip("\n").split("\n"), "```"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
