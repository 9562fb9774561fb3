"""Describes every latent of a run's dictionary: one pass over the cache, then a page and a listing, all or nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsepilot import faults
from sparsepilot.analysis.features.directions import Best, Lens, logit_lens, nearest, residual_directions
from sparsepilot.analysis.features.kept import WIDTH
from sparsepilot.analysis.features.listing import line, table_row
from sparsepilot.analysis.features.page import PAGE, PageWriter
from sparsepilot.analysis.features.records import Record, records, rounded
from sparsepilot.analysis.features.score import Scorer
from sparsepilot.analysis.features.source import Source, open_source
from sparsepilot.analysis.features.sparse_codes import SparseEncoder
from sparsepilot.analysis.features.survey import NUM_BINS, SAMPLE, TOP, Reader, Survey, bin_edges
from sparsepilot.errors import ConfigError
from sparsepilot.run_folder import RunFolder, make_folder, sync_folder, write_json

FORMAT = 1
STATE, LISTING, SUMMARY, TABLE = "pass.npz", "features.jsonl", "features.json", "sample.json"
NUM_TOKENS, NUM_NEAREST = 10, 8
NUM_BEST, NUM_PICKED = 200, 20


class Found(NamedTuple):
    """All that records are made from."""

    survey: Survey
    scorer: Scorer
    lens: Lens | None
    near: Best


def build(
    run_dir: str,
    out: str | None = None,
    cache: str | None = None,
    rows: int | None = None,
    seed: int = 0,
    save_every_s: float = 20.0,
    console: Console | None = None,
) -> Path:
    """Writes a folder with the page (index.html), features.jsonl, features.json and sample.json.

    What the pass has gathered is saved in a folder beside `out` now and then, and taken up by the next call for the
    same dictionary and rows. `out` takes its name only when all of it is on disk; one of an earlier call is replaced.

    Args:
        run_dir: a run on activations of a language model whose training has ended.
        out: the folder; None: `<run>/features`.
        cache: read this one instead of the run's.
        rows: so many of its first rows, about; None: all, those of validation too.
        seed: of the choice of NUM_PICKED latents among the NUM_BEST of the highest score.
        save_every_s: seconds from one save to the next, at least.
        console: where progress is shown.

    Returns:
        The page.

    Raises:
        CheckpointError, ConfigError, DataError: when the run, its cache or its language model will not do (see
            `open_source`), or `out` holds something else.
    """
    target = Path(os.path.abspath(out)) if out else Path(os.path.abspath(RunFolder(run_dir).features))
    if rows is not None and (type(rows) is not int or rows < 1):
        raise ConfigError(f"rows = {rows}: should be a whole number of at least 1, or null for all")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"seed = {seed}: should be a whole number of at least 0")
    if type(save_every_s) not in (int, float) or not save_every_s >= 0:
        raise ConfigError(f"save_every_s = {save_every_s}: should be seconds, at least 0")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / SUMMARY).is_file())):
        raise ConfigError(f"out = {target}: is there already and holds something else; name another folder")
    console = console or Console(soft_wrap=True)
    with console.status("opening the dictionary, its cache and the language model"):
        source = open_source(run_dir, cache)
    building = target.with_name(f".{target.name}.building")
    with _alone(building), _progress(console) as progress:
        survey = _pass(source, rows, building / STATE, save_every_s, progress, console)
        page = building / "page"
        shutil.rmtree(page, ignore_errors=True)  # of a call that was killed while it wrote
        page.mkdir()
        _describe(source, survey, page, str(run_dir), seed, progress)
    _publish(building, page, target)
    return target / PAGE


def _pass(
    source: Source, rows: int | None, state: Path, save_every_s: float, progress: Progress, console: Console
) -> Survey:
    total = source.cache.num_train_rows + source.cache.num_val_rows
    total = total if rows is None else min(rows, total)
    identity = {"format": FORMAT, "digest": source.digest, "rows": total, "kept": (TOP, SAMPLE, WIDTH, NUM_BINS)}
    survey = Survey(source.sae.cfg["d_sae"], len(source.words.texts))
    if survey.restore(state, identity):
        console.print(f"going on after {survey.next_row:,} of {total:,} rows", highlight=False)
    reader = Reader(source.cache, source.sae.cfg["sites"], SparseEncoder(source.sae), total)
    task = progress.add_task("reading activations", total=total, completed=survey.next_row)
    saved_at_s = time.monotonic()
    while survey.next_row < total:
        survey.digest(survey.next_row, *reader.gather(survey.next_row))
        progress.update(task, completed=survey.next_row)
        if survey.next_row == total or time.monotonic() - saved_at_s >= save_every_s:
            survey.save(state, identity)
            saved_at_s = time.monotonic()
            if not console.is_terminal:
                console.print(f"read {survey.next_row:,} of {total:,} rows", highlight=False)
            faults.point("features-pass")
    return survey


def _describe(source: Source, survey: Survey, page: Path, run: str, seed: int, progress: Progress) -> None:
    """Fills `page` from a finished pass."""
    sae, words, num_latents = source.sae, source.words, survey.num_latents
    directions_FD = residual_directions(sae, words.unembedding_VD.shape[1])
    lens = None
    if directions_FD is not None:
        task = progress.add_task("promoted tokens", total=num_latents)
        lens = logit_lens(directions_FD, words.unembedding_VD, NUM_TOKENS, lambda n: progress.advance(task, n))
    task = progress.add_task("nearest latents", total=num_latents)
    near = nearest(sae.W_dec.detach(), NUM_NEAREST, lambda n: progress.advance(task, n))
    found = Found(survey, Scorer(words.embedding_VD, survey.token_counts_V), lens, near)
    writer, edges = PageWriter(page, words.texts), rounded(bin_edges()).tolist()
    task = progress.add_task("writing", total=num_latents)
    scores: list[float] = []
    with open(page / LISTING, "w", encoding="utf-8") as listing:
        for record in records(*found):
            listing.write(line(record, words.texts, edges))
            writer.add(record)
            scores.append(-1.0 if record.score is None else record.score)
            progress.advance(task)
            if record.latent == num_latents // 2:
                faults.point("features-write")
    picked = _picked(np.array(scores), found, seed)
    sites = sae.cfg.get("sites_out") or sae.cfg["sites"]
    about = {
        "format": FORMAT,
        "run": run,
        "model": source.model_id,
        "sites": sites,
        "architecture": sae.cfg["architecture"],
        "latents": num_latents,
        "fired": int((survey.fires_F > 0).sum()),
        "rows": survey.next_row,
        "l0": round(float(survey.fires_F.sum() / survey.next_row), 2),
        "edges": edges,
        "best": NUM_BEST,
        "seed": seed,
        "picked": [record.latent for record in picked],
        "lens": lens is not None,
    }
    writer.finish(picked, about)
    write_json(page / TABLE, [table_row(record, words.texts) for record in picked])
    write_json(page / SUMMARY, about)


def _picked(scores_F: NDArray[np.float64], found: Found, seed: int) -> list[Record]:
    """NUM_PICKED latents drawn from the NUM_BEST of the highest score, the highest first."""
    best = np.argsort(-scores_F, kind="stable")[:NUM_BEST]
    best = best[scores_F[best] > -1]
    drawn = np.random.default_rng(seed).choice(best, min(NUM_PICKED, len(best)), replace=False)
    wanted = {int(latent) for latent in drawn}
    return sorted(records(*found, wanted), key=lambda record: -(record.score or 0.0))


def _publish(building: Path, page: Path, target: Path) -> None:
    """Everything on disk, then under its name; an older folder of that name goes."""
    for path in sorted(page.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(page)
    old = building / "old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(page, target)
    sync_folder(target.parent)
    shutil.rmtree(building)


@contextmanager
def _alone(building: Path) -> Iterator[None]:
    """The folder that a page is built in, for this process alone."""
    make_folder(building)
    with open(building / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"out: another process is building in {building}; wait, or name another folder"
            ) from error
        except OSError:
            pass  # a filesystem without locks
        yield


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield progress
