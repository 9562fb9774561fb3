"""Evaluation of a saved dictionary on the held-out rows of its cache and inside its language model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsepilot.analysis.pairs import coded
from sparsepilot.analysis.quality import Latents, Quality
from sparsepilot.analysis.sites import sites_in_cache
from sparsepilot.analysis.source import check_model, check_rows, check_source, held_out_contexts
from sparsepilot.analysis.text import measure_text
from sparsepilot.data.cache import Cache
from sparsepilot.data.together import AnyCache, open_sites
from sparsepilot.errors import ConfigError
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.interop.load import load
from sparsepilot.lm.load import LanguageModel, load_fields
from sparsepilot.lm.seam import Seam
from sparsepilot.metrics.dead import dead_window_samples
from sparsepilot.run_folder import RunFolder, replacing, write_json
from sparsepilot.saved import read_config, read_summary

EVALUATION, LATENTS = "evaluation.json", "evaluation_latents.json"
_BLOCK_ROWS = 4096
_WITHOUT = "lm=none evaluates the rows alone"


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what."""

    name: str
    sae: Dictionary
    cache: AnyCache
    reads: list[str]
    writes: list[str]
    lm: dict[str, Any] | None
    """fields of `lm.load.load`; None leaves the language model out"""
    dead: dict[str, int]
    """of training: dead latents at its end, and the window; empty where nobody knows"""


def open_subject(
    run_dir: str,
    cache: str | None = None,
    lm: Mapping[str, Any] | str | None = None,
    site: str | Sequence[str] | None = None,
) -> Subject:
    """Opens a run's dictionary and its cache; nothing of its checkpoints is read.

    Args:
        run_dir: a run whose training has ended; or anything else that `interop.load` reads, with `cache`.
        cache: path of another cache, whose held-out rows take the place of the run's own.
        lm: fields of `lm.load.load` that take the place of the run's; "none" leaves the language model out.
        site: the cache's name of the dictionary's site, of a transcoder [read, write]; None: what the dictionary's
            file says, in another tool's words where need be (`analysis.sites`).

    Raises:
        CheckpointError, DataError: when the dictionary or the cache cannot be opened.
        ConfigError: when it is not known where the rows are, or they are not those that the dictionary was trained on.
    """
    sae = load(run_dir)
    folder = RunFolder(run_dir)
    config = read_config(folder) if folder.exists() else {}
    path = cache if cache is not None else config.get("data", {}).get("path")
    if path is not None and not isinstance(path, str | dict):
        raise ConfigError(f"run_dir = {run_dir}: its data.path is {path!r}, a cache's path is needed; give cache=...")
    if path is None and "lm_device" in config.get("data", {}):
        raise ConfigError(
            f"run_dir = {run_dir}: its rows were live and are not kept; give a cache of its sites, cache=..."
        )
    if path is None:
        raise ConfigError(f"run_dir = {run_dir}: is no run (no config.yaml), so nobody knows its rows; give cache=...")
    if isinstance(lm, str) and lm != "none":
        raise ConfigError(f"lm = {lm}: give lm=none, or fields of the language model, such as lm.id=...")
    reads, writes = sites_in_cache(sae.cfg, path, site, f"run_dir = {run_dir}")
    opened = open_sites(path, list(dict.fromkeys([*reads, *writes])))
    for what, sites, width in (("reads", reads, sae.cfg["d_in"]), ("writes", writes, sae.cfg["d_out"])):
        there = sum(opened.widths[site] for site in sites)
        if there != width:
            raise ConfigError(
                f"run_dir = {run_dir}: the dictionary {what} {width} numbers, {', '.join(sites)} in {opened} is {there}"
            )
    trained_on = sae.cfg.get("cache_fingerprint")
    if cache is None and trained_on is not None and trained_on != opened.fingerprint:
        raise ConfigError(
            f"run_dir = {run_dir}: the cache at {opened} is not the one that it was trained on (its fingerprint is "
            f"another); give its place as cache=..., or this one's to evaluate on it all the same"
        )
    if opened.num_val_rows == 0:
        raise ConfigError(f"run_dir = {run_dir}: the cache at {opened} has no validation rows; give another, cache=...")
    fields = None if lm == "none" else {**config.get("lm", {}), **(lm if isinstance(lm, Mapping) else {})}
    return Subject(str(run_dir), sae, opened, reads, writes, fields, _dead(folder, config))


def evaluate(
    subject: Subject,
    *,
    tokens: int | None = 10_000,
    rows: int | None = 100_000,
    batch_contexts: int = 4,
    language_models: dict[str, LanguageModel] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Everything that `evaluation.json` and `evaluation_latents.json` hold (docs/evaluation.md says what each means).

    Args:
        subject: from `open_subject`.
        tokens: predictions of the language model at least, spread over the held-out text; None: all.
        rows: held-out rows at most, in evenly spaced blocks; None: all.
        batch_contexts: contexts per pass of the language model.
        language_models: loaded already, by their fields; what is loaded is added.
        say: is told what is being done.

    Raises:
        ConfigError, DataError: for a language model that is not the cache's, or cannot be measured.
    """
    sae, cache = subject.sae, subject.cache
    for field, value in (("tokens", tokens), ("rows", rows), ("batch_contexts", batch_contexts)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{field} = {value}: a positive integer is needed")
    # whatever is wrong with the language model is said before anything is measured
    model = None if subject.lm is None else _language_model(subject, {} if language_models is None else language_models)
    began_s = time.process_time()
    quality = Quality(_means(cache, subject.writes), sae.cfg["d_sae"])
    latents = Latents(sae.cfg["d_sae"])
    say(f"rows of {cache}")
    for start, stop in _blocks(cache, rows):
        x_BD, y_BD = (_read(cache, sites, start, stop) for sites in (subject.reads, subject.writes))
        for part in coded(sae, x_BD):
            quality.update(y_BD[part.rows], part.y_hat_BD, part.ids_P)
            latents.update(part.ids_P, part.values_P, part.num_rows)
    found: dict[str, Any] = {
        "run": subject.name,
        "architecture": sae.cfg["architecture"],
        "sites": subject.reads,
        "sites_out": subject.writes,
        "cache": str(cache),
        "rows": quality.figures(),
        "latents": {**latents.summary(), **subject.dead},
    }
    rows_cpu_s = time.process_time() - began_s
    costs = {"rows_cpu_s": round(rows_cpu_s, 2)}
    if model is not None:
        assert isinstance(cache, Cache)
        say(f"text through {model.id}")
        read, write = subject.reads[0], subject.writes[0]
        contexts = held_out_contexts(cache, model, "run_dir")
        check_rows(cache, read, model, contexts)
        began_s = time.process_time()
        figures = measure_text(
            sae, Seam(model, read, write), contexts, cache.stats(write).mean_D,
            tokens=tokens, batch_contexts=batch_contexts,
            progress=lambda done, of: say(f"text through {model.id}: {done} of {of} batches"),
        )  # fmt: skip
        costs["text_cpu_s"] = round(time.process_time() - began_s, 2)
        found["language_model"] = {"id": model.id, "dtype": str(model.dtype).removeprefix("torch."), **figures.text}
        found["language_model"] |= figures.language_model
        found["with_special_tokens"] = figures.with_special_tokens
        found["without_special_tokens"] = figures.without_special_tokens
        found["sae_lens"] = figures.sae_lens
    found["cost"] = {**costs, "threads": torch.get_num_threads()}
    return found, latents.each()


def write_evaluation(folder: Path, found: dict[str, Any], each: dict[str, list[float]]) -> Path:
    """Writes both files, each all or nothing; the summary last, so that it is never older than what it sums up."""
    _write_columns(folder / LATENTS, each)
    write_json(folder / EVALUATION, found)
    return folder / EVALUATION


def _write_columns(path: Path, columns: dict[str, list[float]]) -> None:
    """An object of long lists, a line each, all or nothing."""
    with replacing(path) as file:
        lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in columns.items())
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def _language_model(subject: Subject, loaded: dict[str, LanguageModel]) -> LanguageModel:
    field = f"run_dir = {subject.name}"
    if len(subject.reads) != 1 or len(subject.writes) != 1:
        sites = ", ".join(dict.fromkeys([*subject.reads, *subject.writes]))
        raise ConfigError(f"{field}: a dictionary of several sites ({sites}) has no one place to be put in; {_WITHOUT}")
    if not isinstance(subject.cache, Cache):
        raise ConfigError(f"{field}: its rows come from several caches, each of its own language model; {_WITHOUT}")
    assert subject.lm is not None
    if subject.lm.get("id") is None and "model_id" in subject.cache.source:
        made_by = subject.cache.source["model_id"]
        raise ConfigError(f"{field}: does not say where the language model {made_by} is; give lm.id=...")
    check_source(subject.cache, subject.lm, field, _WITHOUT)
    key = json.dumps(subject.lm, sort_keys=True)
    if key not in loaded:
        loaded[key] = load_fields(subject.lm)
    check_model(subject.cache, loaded[key])
    return loaded[key]


def _dead(folder: RunFolder, config: dict[str, Any]) -> dict[str, int]:
    dead = read_summary(folder)["metrics"].get("train/dead_latents")
    samples, batch = config.get("samples"), config.get("batch")
    if not isinstance(dead, int | float) or not isinstance(samples, int) or not isinstance(batch, int) or batch < 1:
        return {}
    budget_samples = -(-samples // batch) * batch  # in whole batches
    return {"dead": int(dead), "dead_window_samples": dead_window_samples(budget_samples)}


def _means(cache: AnyCache, sites: list[str]) -> torch.Tensor:
    return torch.cat([cache.stats(site).mean_D.float() for site in sites])


def _blocks(cache: AnyCache, rows: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of held-out rows: all, or evenly spaced blocks with `rows` in all."""
    first, num = cache.num_train_rows, cache.num_val_rows
    num_blocks = -(-num // _BLOCK_ROWS)
    kept = num_blocks if rows is None else min(num_blocks, -(-rows // _BLOCK_ROWS))
    left = num if rows is None else rows
    for block in (i * num_blocks // kept for i in range(kept)):
        start = first + block * _BLOCK_ROWS
        stop = min(start + _BLOCK_ROWS, first + num, start + left)
        left -= stop - start
        yield start, stop


def _read(cache: AnyCache, sites: list[str], start: int, stop: int) -> torch.Tensor:
    """[stop - start, widths side by side] raw, fp32."""
    return torch.cat([cache.read(site, start, stop).float() for site in sites], dim=1)
