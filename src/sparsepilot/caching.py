"""Where the language model and the cache meet: harvesting a model's activations into a cache, shard by shard."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsepilot.config.instantiate import instantiate
from sparsepilot.data import synthetic
from sparsepilot.data.cache import Cache, Manifest
from sparsepilot.data.layout import MANIFEST_FILE, PLAN_FILE
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create, load_plan
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm import text as lm_text
from sparsepilot.lm.harvest import Block, describe, expand_sites, harvest, site_widths
from sparsepilot.lm.load import LanguageModel, load
from sparsepilot.lm.pack import Packed, pack_text


def is_sealed(path: Path) -> bool:
    """Whether a finished cache lies at `path`. Raises ConfigError where nobody can look."""
    try:
        return (path / MANIFEST_FILE).is_file()
    except OSError as error:
        raise ConfigError(f"data.path = {path}: cannot be read: {error.strerror}; name another place") from error


def array_rank(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world) of this writer: as given, else from a Slurm array (whose ids may start anywhere), else alone.

    >>> array_rank(None, None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"})
    (2, 4)
    >>> array_rank(None, None, {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_STEP": "2",
    ...     "SLURM_ARRAY_TASK_COUNT": "3"})
    (2, 3)
    >>> array_rank(None, None, {})
    (0, 1)
    """
    if rank is None:
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", d)) for name, d in (("MIN", 0), ("STEP", 1)))
        rank = (int(environment.get("SLURM_ARRAY_TASK_ID", 0)) - first) // step
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
    """This process's share of the cache that a `data` group describes, by its `build` recipe.

    Returns the sealed cache, or None while other processes' shares are missing.
    """
    console = console or Console(soft_wrap=True)
    given = {"path": data["path"], "rank": rank, "world": world, "_convert_": "all"}
    if _is_from_lm(data["build"]):
        given |= {"sites": data["sites"], "lm": lm, "text": text, "seed": 0, "console": console, "_recursive_": False}
        return cast(Cache | None, instantiate(data["build"], **given))
    with _bar(console, "making rows") as show:
        return cast(Cache | None, instantiate(data["build"], progress=show, **given))


def check_recipe(data: Mapping[str, Any], lm: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Checks that a sealed cache at `data.path` is the one that `data.build` would make, as far as can be told without
    the language model; does nothing where there is no recipe or no sealed cache.

    What depends on the machine is left to the cache: chunk sizes of 0, `lm.dtype=auto`, Python's own version.

    Raises:
        DataError: naming the first field that differs, both values, and what to do.
    """
    build = data.get("build")
    if build is None or not is_sealed(path := Path(data["path"])):
        return
    plan = Manifest.read(path).plan
    if _is_from_lm(build):
        wanted, there = _lm_recipe(data["sites"], build, lm, text), _lm_recipe_of(plan)
    else:
        wanted = {f"data.build.{name}": value for name, value in (_defaults(synthetic.build) | dict(build)).items()}
        there = {f"data.build.{name}": value for name, value in synthetic.recipe_of(plan).items()}
    if not there:
        raise DataError(
            f"data.path = {data['path']!r}: holds a cache of another kind than data.build makes; {_ELSEWHERE}"
        )
    for field, value in wanted.items():
        if field in there and not _is_met(field, value, there[field], plan):
            raise DataError(
                f"{field} = {value!r}: the cache at data.path = {data['path']} was built with {there[field]!r}; "
                f"{_ELSEWHERE}, or the old value"
            )


_ELSEWHERE = "choose another data.path to build one there"


def _is_met(field: str, wanted: Any, there: Any, plan: CachePlan) -> bool:
    if field == "data.sites":  # a run may read some of the sites that were cached
        return all(site in there or site.removesuffix(":out") in plan.widths for site in wanted)
    left_open = {"data.build.chunk_rows": 0, "data.build.shard_rows": 0, "lm.dtype": "auto"}
    return wanted == there or (field in left_open and wanted == left_open[field])


def _is_from_lm(build: Mapping[str, Any]) -> bool:
    return cast(str, build["_target_"]).endswith(build_from_lm.__name__)


_RECORDED = ("data.sites", "data.build.max_tokens", "data.build.val_fraction", "lm.gguf", "lm.revision")
"""Of a recipe, what a plan would not hold otherwise."""


def _lm_recipe(
    sites: Sequence[str], build: Mapping[str, Any], lm: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    """What the rows of a cache depend on, by the names that it has in the configuration; as JSON."""
    build, lm, text = _defaults(build_from_lm) | dict(build), _defaults(load) | dict(lm), dict(text)
    names = ("dtype", "context_length", "max_tokens", "val_fraction", "chunk_rows", "shard_rows")
    return {
        "data.sites": list(sites),
        **{f"data.build.{name}": build[name] for name in names},
        "lm.id": lm["id"],
        "lm.gguf": lm["gguf"] and Path(lm["gguf"]).name,  # a file may be moved
        "lm.revision": lm["revision"],
        "lm.dtype": lm["dtype"],
        **_text_recipe(text),
    }


def _lm_recipe_of(plan: CachePlan) -> dict[str, Any]:
    """The recipe of a cache, as far as it is recorded; empty where no language model made it."""
    source = plan.source
    if "model_id" not in source:
        return {}
    return {
        "data.build.dtype": plan.dtype,
        "data.build.context_length": source["context_length"],
        "data.build.chunk_rows": plan.chunk_rows,
        "data.build.shard_rows": plan.shard_rows,
        "lm.id": source["model_id"],
        "lm.dtype": source["model_dtype"],
        **_text_recipe({name: value for name, value in source["text"].items() if name != "python"}),
        **source.get("recipe", {}),  # not in caches of before it was recorded
    }


def _text_recipe(text: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"source": text["source"]} | _defaults(lm_text.documents) | dict(text)
    return {f"text.{name}": list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


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
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05,
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
        packed = pack_text(
            model.tokenizer,
            text,
            context_length=context_length,
            val_fraction=val_fraction,
            seed=seed,
            max_tokens=max_tokens,
        )
    source = describe(model, packed, lm_text.describe(**text))
    if not (Path(path) / PLAN_FILE).is_file() or "recipe" in load_plan(Path(path)).source:  # else begun before it was
        recipe = _lm_recipe(sites, {"max_tokens": max_tokens, "val_fraction": val_fraction}, lm, text)
        source["recipe"] = {name: recipe[name] for name in _RECORDED}
    plan = CachePlan(packed.num_train_rows, packed.num_val_rows, widths, dtype, chunk_rows, shard_rows, source)
    create(path, plan)
    writer = CacheWriter(path, rank, world)
    _write(writer, model, packed, names, dtype, batch_contexts, console)
    return writer.finish()


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
    done = 0
    say_once = iter([f"waiting for another process that writes {writer.path}, too"])

    def wait() -> None:
        for text in say_once:
            console.print(text, highlight=False)

    with _bar(console, "harvesting activations") as show:

        def counted(blocks: Iterator[Block]) -> Iterator[Block]:
            nonlocal done
            for block in blocks:
                done += len(block.rows)
                show(done, total)
                yield block

        for rows in writer.shares(wait):
            done = sum(len(before) for before in pending if before.start < rows.start)
            blocks = harvest(
                model,
                packed,
                sites,
                rows,
                batch_contexts=batch_contexts,
                dtype="float32" if dtype == "int8" else dtype,
            )
            shard = _join(counted(blocks))
            writer.write_shard(rows, shard.x, shard.tokens, shard.positions, shard.documents)


@contextmanager
def _bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, where there is a terminal, moved by calling what it yields with (rows done, rows in all)."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
