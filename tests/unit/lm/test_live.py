"""`data=live`: rows like a cache's, the same order and bits from any position and on any number of ranks."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from rich.console import Console
from warm import Warm

from sparsepilot.caching import build_cache
from sparsepilot.data.source import TextRows
from sparsepilot.errors import ConfigError, DataError, SparsepilotError
from sparsepilot.live.datamodule import LiveData
from sparsepilot.live.rows import LiveRows
from sparsepilot.lm.capture import capture
from sparsepilot.lm.load import load
from sparsepilot.lm.pack import pack
from sparsepilot.lm.text import documents
from sparsepilot.rows import read_rows
from sparsepilot.run import train

sys.path.insert(0, str(ROOT / "benchmarks"))

from killing.compare import run_differences
from killing.runs import launch

SITES = ["model.layers.2", "model.layers.1.mlp:in"]
CONTEXT, BATCH_CONTEXTS, STREAMS = 16, 4, 8
Overrides = Callable[..., list[str]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 texts of the words that the tiny tokenizer knows, about 9,000 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    make_words = np.random.default_rng(0)
    for number in range(120):
        (folder / f"{number}.txt").write_text(" ".join(make_words.choice(list("abcdefgh"), 20 + number)))
    return folder


@pytest.fixture
def data(texts: Path, tiny_folder: Path, tmp_path: Path) -> Callable[..., LiveData]:
    """data(seed=1): what a run would train on."""

    def make(**changed: Any) -> LiveData:
        fields = {
            "sites": SITES, "num_streams": STREAMS, "window_mb": 1, "val_rows": 300, "dtype": "float32",
            "context_length": CONTEXT, "batch_contexts": BATCH_CONTEXTS, "val_fraction": 0.2, "stats_rows": 1000,
            "lm": {"id": str(tiny_folder), "dtype": "float32"}, "text": {"source": "files", "paths": [f"{texts}/*.txt"]},
            "folder": str(tmp_path / "run"), "batch": 64, "accumulate": 1, "total_samples": 64 * 200, "seed": 0,
        }  # fmt: skip
        return LiveData(**{**fields, **changed})

    return make


@pytest.fixture
def overrides(texts: Path, tiny_folder: Path, tmp_path: Path) -> Overrides:
    """overrides("model.k=3"): a run of 24 steps, a little more than one pass."""

    def make(*more: str) -> list[str]:
        return [
            "data=live", "data.sites=[model.layers.2]", f"data.num_streams={STREAMS}", "data.window_mb=1",
            f"data.context_length={CONTEXT}", f"data.batch_contexts={BATCH_CONTEXTS}", "data.val_fraction=0.2",
            "data.val_rows=1000", "data.stats_rows=1000", "data.dtype=float32", "lm=hf", f"lm.id={tiny_folder}",
            "lm.dtype=float32", "text=files", f"text.paths=[{texts}/*.txt]", "model.d_sae=64", "model.k=4",
            "batch=256", "samples=6144", "logger=none", "report=false", "threads=1", "callbacks.log_every_steps=1",
            "callbacks.validate_every_samples=2048", "callbacks.checkpoint_every_samples=1024",
            "callbacks.checkpoint_every_minutes=1000", f"run_dir={tmp_path}/run", *more,
        ]  # fmt: skip

    return make


def contexts_of(rows: TextRows, start: int, stop: int) -> dict[bytes, dict[str, torch.Tensor]]:
    """Rows by the labels of their contexts, of which no two are alike here."""
    positions_N = rows.positions(start, stop)
    labels_N3 = np.stack([rows.tokens(start, stop), positions_N, rows.documents(start, stop)], axis=1)
    borders = [*np.flatnonzero(np.diff(positions_N, prepend=CONTEXT) <= 0).tolist(), stop - start]
    x = {site: rows.read(site, start, stop) for site in SITES}
    return {
        labels_N3[a:b].tobytes(): {site: x[site][a:b] for site in SITES}
        for a, b in zip(borders, borders[1:], strict=False)
    }


def test_the_rows_are_those_of_a_cache_of_the_same_text(
    data: Callable[..., LiveData], texts: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    module = data(val_rows=10_000)
    recipe = {"_target_": "sparsepilot.caching.build_from_lm", "context_length": CONTEXT, "dtype": "float32"}
    cache = build_cache(
        {"path": str(tmp_path / "cache"), "sites": SITES, "build": {**recipe, "val_fraction": 0.2}},
        {"id": str(tiny_folder), "dtype": "float32"},
        {"source": "files", "paths": [f"{texts}/*.txt"]},
        console=Console(quiet=True),
    )
    assert cache is not None
    live = module.cache
    assert isinstance(live, TextRows)
    assert (live.num_train_rows, live.num_val_rows) == (cache.num_train_rows, cache.num_val_rows)
    num_train, num_rows = cache.num_train_rows, cache.num_train_rows + cache.num_val_rows
    for start, stop in ((0, num_train), (num_train, num_rows)):
        ours, theirs = contexts_of(live, start, stop), contexts_of(cache, start, stop)
        assert ours.keys() == theirs.keys()
        for labels, found in ours.items():
            for site in SITES:
                assert found[site].dtype == theirs[labels][site].dtype
                torch.testing.assert_close(found[site], theirs[labels][site], rtol=1e-5, atol=1e-6)
    first = iter(contexts_of(live, 0, num_train))
    assert list(first) != list(contexts_of(cache, 0, num_train))  # dealt out: neighbours are not of one document
    everything = {site: live.stats(site) for site in SITES}
    module.rows.moments = module.rows.measure(num_train)
    for site in SITES:
        torch.testing.assert_close(live.stats(site).mean_D, cache.stats(site).mean_D, rtol=1e-4, atol=1e-5)
        # 1,000 rows of 5,600 say nearly the same
        assert everything[site].scale == pytest.approx(cache.stats(site).scale, rel=0.05)


def test_a_row_has_one_set_of_bits_and_sites_share_a_pass(data: Callable[..., LiveData], lm: Any) -> None:
    rows = data().rows
    whole = {site: rows.empty(site, rows.num_train_rows) for site in SITES}
    before = rows.passes
    rows.fill(0, whole, {})
    assert rows.passes - before == len(rows.first_rows) - 1
    # as one product of just this batch of contexts
    a, b = rows.first_rows[3:5].tolist()
    tokens_CL = torch.from_numpy(rows._train.tokens_CL[3 * BATCH_CONTEXTS : 4 * BATCH_CONTEXTS]).long()
    mask_N = torch.from_numpy(rows._train.mask_CL[3 * BATCH_CONTEXTS : 4 * BATCH_CONTEXTS]).flatten()
    alone = capture(lm, SITES, tokens_CL)
    assert all(torch.equal(whole[site][a:b], alone[site][mask_N]) for site in SITES)
    for start, stop in ((0, 1), (a + 1, b - 1), (b - 1, b + 1), (rows.num_train_rows - 5, rows.num_train_rows)):
        for site in SITES:
            assert torch.equal(rows.read(site, start, stop), whole[site][start:stop])


def test_from_any_position_and_on_any_number_of_ranks(data: Callable[..., LiveData]) -> None:
    module = data()
    batches = [batch.x_BD for batch in module.train_dataloader()]
    assert len(batches) == 200  # more than two passes
    width = sum(module.cache.widths[site] for site in SITES)
    for step in (0, 77, 199):
        rows = module.order.batch_rows(step * 64, 64)
        expected = [torch.cat([module.cache.read(site, r, r + 1) for site in SITES], dim=1) for r in rows.tolist()]
        assert torch.equal(batches[step], torch.cat(expected))
        assert batches[step].shape == (64, width)
    unbroken = module.rows.passes
    for rank in range(2):
        half = data()
        half.start_sample = 64 * 120
        before = half.rows.passes
        for batch, whole in zip(half._loader(rank, 2), batches[120:], strict=True):
            assert torch.equal(batch.x_BD, whole[32 * rank : 32 * (rank + 1)])
        # of each stream's two blocks the one in use was begun before, and has to be made again; the other had not come
        per_block = module.order.window_rows_per_stream // module.order.chunk_rows
        needed = sum(_batches_of(module, stream, 960, 1600) for stream in range(4 * rank, 4 * rank + 4))
        assert half.rows.passes - before <= needed + 4 * 2 * per_block
        assert half.rows.passes - before < unbroken / 2


def _batches_of(module: LiveData, stream: int, start: int, stop: int) -> int:
    """Batches of the language model that a stream's rows [start, stop) are of."""
    rows = module.order.rows(stream, start, stop)
    passes = np.arange(start, stop) // module.order.stream_rows(stream)
    return len(
        {*zip(passes.tolist(), np.searchsorted(module.rows.first_rows, rows, side="right").tolist(), strict=True)}
    )
