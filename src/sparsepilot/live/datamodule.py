"""`data=live`: training on activations that the language model makes meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt

from sparsepilot.data.datamodule import RunData, check_names
from sparsepilot.data.files import canonical_json, read_json, write_json
from sparsepilot.data.statistics import Moments
from sparsepilot.data.whole_chunks import WholeChunks
from sparsepilot.data.window import window_rows_per_stream
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.live.rows import LiveRows, check_same, in_our_words
from sparsepilot.lm import text as lm_text
from sparsepilot.lm.devices import device_here
from sparsepilot.lm.harvest import describe, expand_sites
from sparsepilot.lm.load import LanguageModel, load
from sparsepilot.lm.pack import pack_text
from sparsepilot.parallel.agreement import from_all, from_first
from sparsepilot.run_folder import RunFolder

SPLIT_SEED = 0
"""As caches have it: the same documents are held out for every seed of a run."""


class LiveData(RunData):
    """Rows of a text that each rank's own language model makes for the streams of that rank, without a cache.

    The text is tokenized and packed when a run starts, on every rank, and the tokens are held in memory (9 bytes each).
    A pass of the run is all of them; `max_tokens` says where it ends for a text that is too long for that, or has no
    end. What is read ahead of training, the windows, is also where the rows are shuffled.

    Statistics are of the first `stats_rows` training rows. They are made once in the life of a run, by rank 0, and kept
    in the run folder (`live.json`) with a description of model and text that every later process must meet.

    Args:
        sites: dotted module paths or globs, `:in` for an input; all of them are taken in one pass.
        num_streams: virtual streams of the order.
        window_mb: MiB of rows in memory, over all ranks: two blocks per stream, each of whole batches of the language
            model.
        prefetch_batches: micro-batches read ahead of training.
        val_batch: rows per validation batch on each rank.
        val_rows: held-out rows, made once and kept in memory on each rank.
        dtype: of rows in memory.
        context_length: tokens per context.
        batch_contexts: contexts per forward pass.
        max_tokens: read no more text than this.
        val_fraction: share of the documents that is held out.
        stats_rows: rows that mean, variance and scale are taken of.
        lm_device: where the language model runs; of several on a machine, one for each rank that runs there. None:
            `lm.device`. A bare "cuda" is the rank's own GPU.
        lm: fields of `lm.load.load`.
        text: fields of `lm.text.documents`.
        folder: the run folder.
        say: is told what takes a while.

    Raises:
        ConfigError: for a window that holds too little, or more than the text, and sizes that do not fit.
        DataError: for a model, site or text that is not there, and for others than the run was begun with.
    """

    def __init__(
        self,
        sites: Sequence[str],
        num_streams: PositiveInt = 64,
        window_mb: PositiveInt = 512,
        prefetch_batches: PositiveInt = 4,
        val_batch: PositiveInt = 4096,
        val_rows: PositiveInt = 32_768,
        dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16",
        context_length: PositiveInt = 256,
        batch_contexts: PositiveInt = 8,
        max_tokens: PositiveInt | None = None,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05,
        stats_rows: PositiveInt = 65_536,
        lm_device: str | list[str] | None = None,
        *,
        lm: Mapping[str, Any],
        text: Mapping[str, Any],
        folder: str,
        say: Callable[[str], None] = lambda line: None,
        batch: int,
        accumulate: int,
        total_samples: int,
        seed: int,
    ) -> None:
        check_names(sites)
        say("loading the language model, reading and packing the text")
        model = _load(lm, lm_device)
        names = expand_sites(model, sites)
        with in_our_words():
            packed = pack_text(
                model.tokenizer,
                text,
                context_length=context_length,
                val_fraction=val_fraction,
                seed=SPLIT_SEED,
                max_tokens=max_tokens,
            )
            source = describe(model, packed, lm_text.describe(**text))
            rows = LiveRows(model, packed, names, dtype, batch_contexts, val_rows, source)
        order = _order(rows, num_streams, window_mb, batch_contexts, seed)
        super().__init__(
            rows, names, order, prefetch_batches, val_batch, None,
            batch=batch, accumulate=accumulate, total_samples=total_samples,
        )  # fmt: skip
        first, *others = from_all(rows.identity)
        different = [number for number, other in enumerate(others, 1) if other != first]
        if different:
            raise DataError(f"data=live: rank {different[0]} has another text or language model than rank 0")
        self._file = RunFolder(folder).live
        self.rows = rows
        rows.moments = from_first(lambda: self._kept() or _measured(rows, stats_rows, say))

    def record(self) -> None:
        """Keeps the statistics, and what the rows depend on, for as long as the run lasts."""
        if not self._file.exists():
            sums = {site: found.to_json() for site, found in self.rows.moments.items()}
            write_json(self._file, {"depends_on": self.rows.identity, "moments": sums})

    def _kept(self) -> dict[str, Moments] | None:
        """The statistics of the process that began this run, whose model and text must be ours."""
        if not self._file.exists():
            return None
        kept = read_json(self._file)
        check_same(self.rows.identity, kept["depends_on"])
        return {site: Moments.from_json(value) for site, value in kept["moments"].items()}

    def _identity(self) -> dict[str, Any]:
        sums = {site: found.to_json() for site, found in self.rows.moments.items()}
        return {**super()._identity(), "statistics": hashlib.sha256(canonical_json(sums)).hexdigest()}


def _measured(rows: LiveRows, num_rows: int, say: Callable[[str], None]) -> dict[str, Moments]:
    say(f"taking mean and variance of {min(num_rows, rows.num_train_rows):,} rows")
    return rows.measure(num_rows)


def _load(lm: Mapping[str, Any], lm_device: str | list[str] | None) -> LanguageModel:
    device = device_here(lm.get("device", "cpu") if lm_device is None else lm_device, "data.lm_device")
    # weights that are about to be overwritten are drawn first: training's own draws must not see it
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return load(**{**lm, "device": device})


def _order(rows: LiveRows, num_streams: int, window_mb: int, batch_contexts: int, seed: int) -> WholeChunks:
    row = sum(rows.row_bytes(site) for site in rows.widths)
    least_rows = 2 * num_streams * rows.chunk_rows
    least_mb, text_mb = -(-least_rows * row // 2**20), rows.num_train_rows * row / 2**20
    if least_rows > rows.num_train_rows:
        raise ConfigError(
            f"data.num_streams = {num_streams}: each stream holds two batches of data.batch_contexts = "
            f"{batch_contexts} contexts, {least_rows:,} rows in all, and the text has {rows.num_train_rows:,}; take "
            "less of either, or more text, or cache it (data=lm)"
        )
    if window_mb < least_mb:
        raise ConfigError(
            f"data.window_mb = {window_mb}: two batches of data.batch_contexts = {batch_contexts} contexts for each of "
            f"data.num_streams = {num_streams} streams need {least_mb}"
        )
    if window_mb > text_mb and window_mb > least_mb:
        raise ConfigError(
            f"data.window_mb = {window_mb}: the rows of the whole text are {text_mb:.0f} MiB, and the language model "
            f"would make them again in each pass; set at most {max(least_mb, int(text_mb))}, or cache them (data=lm)"
        )
    window = window_rows_per_stream(window_mb, num_streams, row)
    return WholeChunks(rows.num_train_rows, rows.chunk_rows, num_streams, window, seed, rows.first_rows)
