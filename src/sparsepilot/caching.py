"""Where the language model and the cache meet: harvesting a model's activations into a cache, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsepilot.config.instantiate import instantiate
from sparsepilot.data.cache import Cache
from sparsepilot.data.layout import MANIFEST_FILE
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create, seal
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm import text as lm_text
from sparsepilot.lm.harvest import Block, describe, expand_sites, harvest, site_widths
from sparsepilot.lm.load import LanguageModel, load
from sparsepilot.lm.pack import Packed, pack


def is_sealed(path: Path) -> bool:
    """Whether a finished cache lies at `path`."""
    return (path / MANIFEST_FILE).is_file()


def array_rank(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world) of this writer: as given, else from a Slurm array (whose ids may start anywhere), else alone.

    >>> array_rank(None, None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"})
    (2, 4)
    >>> array_rank(None, None, {})
    (0, 1)
    """
    if rank is None:
        rank = int(environment.get("SLURM_ARRAY_TASK_ID", 0)) - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    if world is None:
        world = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))
    if not 0 <= rank < world:
        raise ConfigError(f"rank = {rank}: should be from 0 to world - 1 = {world - 1}")
    return rank, world


def build_cache(
    data: Mapping[str, Any],
    lm: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
    console: Console | None = None,
) -> Cache | None:
    """Builds the cache that a `data` group describes, by its `build` recipe."""
    recipe = data["build"]
    if recipe["_target_"].endswith(build_from_lm.__name__):
        given = {"sites": data["sites"], "lm": lm, "text": text, "seed": 0, "rank": rank, "world": world}
        cache = instantiate(recipe, path=data["path"], console=console, _recursive_=False, _convert_="all", **given)
    else:
        cache = instantiate(recipe, path=data["path"], _convert_="all")
    return cast(Cache | None, cache)


def build_from_lm(
    path: str,
    sites: Sequence[str],
    lm: Mapping[str, Any],
    text: Mapping[str, Any],
    seed: int,
    *,
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "bfloat16",
    context_length: PositiveInt = 256,
    batch_contexts: PositiveInt = 8,
    max_tokens: PositiveInt | None = None,
    val_fraction: float = 0.05,
    chunk_rows: NonNegativeInt = 0,
    shard_rows: NonNegativeInt = 0,
    rank: NonNegativeInt = 0,
    world: PositiveInt = 1,
    console: Console | None = None,
) -> Cache | None:
    """Writes this process's share of a cache, and seals it when every share is there.

    Any number of processes may work on one cache (`rank` of `world`), each resuming where it was.

    Args:
        path: folder of the cache.
        sites: dotted module paths or globs, `:in` for an input.
        lm: fields of `lm.load.load`.
        text: fields of `lm.text.documents`.
        seed: of the split into training and validation documents and their order.
        dtype: how rows are stored; int8 takes one fp32 scale a row.
        context_length: tokens per context.
        batch_contexts: contexts per forward pass.
        max_tokens: read no more text than this.
        val_fraction: share of the documents that is held out.
        chunk_rows, shard_rows: of the stored arrays; 0 picks them by bytes.

    Returns:
        The sealed cache, or None while other processes' shares are missing.
    """
    console = console or Console(soft_wrap=True)
    with console.status("loading the language model"):
        model = load(**lm)
        names = expand_sites(model, list(sites))
        widths = site_widths(model, names)
    with console.status("reading and packing the text"):
        packed = pack(
            model.tokenizer,
            lm_text.documents(**text),
            context_length=context_length,
            val_fraction=val_fraction,
            seed=seed,
            max_tokens=max_tokens,
        )
    source = describe(model, packed, lm_text.describe(**text))
    plan = CachePlan(packed.num_train_rows, packed.num_val_rows, widths, dtype, chunk_rows, shard_rows, source)
    create(path, plan)
    writer = CacheWriter(path, rank, world)
    _write(writer, model, packed, names, dtype, batch_contexts, console)
    try:
        return seal(path)
    except DataError:
        if world > 1:
            return None  # another process has not finished its share; the last one to finish seals
        raise


def _write(
    writer: CacheWriter,
    model: LanguageModel,
    packed: Packed,
    sites: list[str],
    dtype: str,
    batch_contexts: int,
    console: Console,
) -> None:
    pending = writer.pending()
    total = sum(len(rows) for rows in pending)
    columns = (TextColumn("harvesting activations"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("harvest", total=total)
        for rows in pending:
            blocks = harvest(
                model,
                packed,
                sites,
                rows,
                batch_contexts=batch_contexts,
                dtype="float32" if dtype == "int8" else dtype,
            )
            shard = _join(_advancing(blocks, bar, task))
            writer.write_shard(rows, shard.x, shard.tokens, shard.positions, shard.documents)


def _advancing(blocks: Iterator[Block], bar: Progress, task: Any) -> Iterator[Block]:
    for block in blocks:
        bar.advance(task, len(block.rows))
        yield block


def _join(blocks: Iterator[Block]) -> Block:
    """Consecutive blocks as one."""
    parts = list(blocks)
    return Block(
        rows=range(parts[0].rows.start, parts[-1].rows.stop),
        x={site: torch.cat([part.x[site] for part in parts]) for site in parts[0].x},
        tokens=np.concatenate([part.tokens for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        documents=np.concatenate([part.documents for part in parts]),
    )
