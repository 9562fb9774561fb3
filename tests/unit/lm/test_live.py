"""`data=live`: rows like a cache's, the same order and bits from any position and on any number of ranks."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing.compare import run_differences
from rich.console import Console
from warm import Warm

from sparsepilot.analysis.evaluate import open_subject
from sparsepilot.analysis.features.source import open_source
from sparsepilot.caching import build_cache
from sparsepilot.data.source import TextRows
from sparsepilot.errors import ConfigError, DataError, SparsepilotError
from sparsepilot.live.datamodule import LiveData
from sparsepilot.live.rows import LiveRows
from sparsepilot.lm.capture import capture
from sparsepilot.lm.load import load
from sparsepilot.rows import read_rows
from sparsepilot.run import train

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
            "lm": {"id": str(tiny_folder), "dtype": "float32"},
            "text": {"source": "files", "paths": [f"{texts}/*.txt"]},
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
    return {labels_N3[a:b].tobytes(): {site: x[site][a:b] for site in SITES} for a, b in itertools.pairwise(borders)}


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


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The tokens of each forward pass of a harvest."""
    seen: list[bytes] = []

    def noted(lm: Any, sites: list[str], tokens_CL: torch.Tensor, take: Any) -> Any:
        seen.append(tokens_CL.numpy().astype(np.int32).tobytes())
        return capture(lm, sites, tokens_CL, take)

    monkeypatch.setattr("sparsepilot.lm.harvest.capture", noted)
    return seen


def whole_batches(rows: LiveRows) -> set[bytes]:
    """All that may ever be a training pass: so small a model's bits do not tell a row's company, a large one's do."""
    contexts = range(0, rows._train.num_contexts, BATCH_CONTEXTS)
    return {rows._train.tokens_CL[c : c + BATCH_CONTEXTS].tobytes() for c in contexts}


def test_a_row_has_one_set_of_bits_and_sites_share_a_pass(
    data: Callable[..., LiveData], lm: Any, passes: list[bytes]
) -> None:
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
    assert set(passes) == whole_batches(rows)


def test_from_any_position_and_on_any_number_of_ranks(data: Callable[..., LiveData], passes: list[bytes]) -> None:
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
    assert set(passes) == whole_batches(module.rows)


def _batches_of(module: LiveData, stream: int, start: int, stop: int) -> int:
    """Batches of the language model that a stream's rows [start, stop) are of."""
    rows = module.order.rows(stream, start, stop)
    passes = np.arange(start, stop) // module.order.stream_rows(stream)
    return len(
        {*zip(passes.tolist(), np.searchsorted(module.rows.first_rows, rows, side="right").tolist(), strict=True)}
    )


@pytest.mark.slow  # two runs here and a start of train.py with transformers
def test_a_run_without_a_cache(
    compose_cfg: Any, overrides: Overrides, warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and started again: equal bits, statistics not taken twice, and no more text run again than the window."""
    spliced = ("cross_entropy=spliced", "cross_entropy.tokens=300")
    made: list[LiveRows] = []
    monkeypatch.setattr(LiveRows, "__init__", _noted(LiveRows.__init__, made))
    whole = train(compose_cfg(*overrides(*spliced, f"run_dir={tmp_path}/whole")))
    assert {"val/fvu", "val/ce", "val/kl", "train/loss"} <= whole["metrics"].keys()

    # in step 14, after the checkpoint at step 12
    command = ["train.py", *overrides(*spliced, f"run_dir={tmp_path}/broken")]
    ended = warm(command, {"SPARSEPILOT_FAULT": "mid-step:14"})
    assert ended.code == -9, ended.out
    monkeypatch.setattr(LiveRows, "measure", None)
    train(compose_cfg(*command[1:]))
    assert run_differences(tmp_path / "whole", tmp_path / "broken") == []

    with pytest.raises(ConfigError, match="its rows were live and are not kept; give a cache of its sites"):
        open_subject(tmp_path / "whole")
    with pytest.raises(ConfigError, match="its rows were live and are not kept; give a cache of its sites"):
        open_source(str(tmp_path / "whole"))

    unbroken, resumed = made
    measured = -(-1000 // unbroken.chunk_rows) + 1
    held_out = -(-unbroken.num_val_rows // 40) + 1
    window = 2 * 2**20 // (2 * 128) // unbroken.chunk_rows + STREAMS  # two blocks of each stream, its ends cut
    assert resumed.passes < (unbroken.passes - measured - held_out) / 2 + window + held_out


def _noted(init: Callable[..., None], made: list[LiveRows]) -> Callable[..., None]:
    def noted(self: LiveRows, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    return noted


@pytest.mark.slow  # five processes with transformers
def test_two_ranks_train_as_one_and_one_goes_on_for_two(overrides: Overrides, tmp_path: Path, warm: Warm) -> None:
    def watched(name: str, *more: str) -> list[str]:
        return ["tests/distributed/watched.py", *overrides(f"run_dir={tmp_path}/{name}", "samples=4096", *more)]

    def environment(name: str, **more: str) -> dict[str, str]:
        return {"WATCHED": f"{tmp_path}/{name}-{{rank}}.jsonl", **more}

    def seen(name: str, rank: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / f"{name}-{rank}.jsonl").read_text().splitlines()]

    assert warm(watched("one"), environment("one")).code == 0
    two = ["trainer=ddp_gloo", "trainer.devices=2"]
    killed = environment("two", SPARSEPILOT_FAULT="mid-step:11@1")
    for rank, ended in enumerate(warm.ranks(2, watched("two", *two), killed)):
        assert ended.code != 0, (rank, ended.out)
    ended = warm(watched("two"), environment("after"))
    assert ended.code == 0, ended.out
    assert "at 2,048 samples" in ended.out
    for alone, *ranks in zip(seen("one"), seen("two"), seen("two", 1), strict=False):
        assert [row for rank in ranks for row in rank["rows"]] == alone["rows"]
    for alone, after in zip(seen("one")[8:], seen("after"), strict=True):
        assert after["rows"] == alone["rows"]
    losses = [
        [row["train/loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("~lm",), "lm: missing; set lm=..."),
        (("~text",), "text: missing; set text=..."),
        (("data.sites=[model.layers.9]",), "site 'model.layers.9': no such submodule in"),
        (("data.sites=[]",), "sites=[] names nothing to read"),
        (("data.window_mb=2",), "data.window_mb = 2: the rows of the whole text are 1 MiB, and the language model"),
        (("data.batch_contexts=64",), "data.num_streams = 8: each stream holds two batches of data.batch_contexts"),
        (("data.context_length=100",), "data.context_length=100: "),
        (("data.val_fraction=1",), "data.val_fraction = 1: should be less than 1"),
        (("data.dtype=int8",), "data.dtype = 'int8': should be 'float16', 'bfloat16' or 'float32'"),
        (("data.max_tokens=9",), "text: one document cannot be split; give at least two, or data.val_fraction=0"),
        (("data.lm_device=abacus",), "lm.device='abacus': not a torch device"),
        (("data.lm_device=[cpu,cpu]",), "data.lm_device = ['cpu', 'cpu']: 1 ranks run on this machine; name so many"),
        (("+data.path=here",), "data.path = 'here': there is no such field"),
        (("trainer=ddp_gloo", "trainer.devices=3"), "3 ranks cannot share data.num_streams = 8 equally"),
        (("cross_entropy=spliced", "data.val_fraction=0"), "cross_entropy: data.val_fraction = 0 holds out no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_training(
    compose_cfg: Any, overrides: Overrides, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    left_out = {word[1:] for word in more if word.startswith("~")}
    given = [word for word in overrides(*more) if word.split("=")[0].split(".")[0] not in left_out]
    with pytest.raises(SparsepilotError) as caught:
        train(compose_cfg(*given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_text_or_model_than_the_run_was_begun_with(
    data: Callable[..., LiveData], texts: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    first = data()
    first.record()
    again = data(seed=1)
    assert all(
        torch.equal(a, b) for site in SITES for a, b in [(first.cache.stats(site)[0], again.cache.stats(site)[0])]
    )

    shutil.copytree(texts, tmp_path / "changed")
    (tmp_path / "changed" / "7.txt").write_text("a b c")
    changed = {"source": "files", "paths": [f"{tmp_path}/changed/*.txt"]}
    shutil.copytree(tiny_folder, tmp_path / "tuned")
    model = load(str(tmp_path / "tuned"), dtype="float32").model
    model.model.layers[0].mlp.up_proj.weight.data += 1
    model.save_pretrained(tmp_path / "tuned")
    for change, what in (
        ({"text": changed}, "the text is another, or its documents have other names"),
        ({"lm": {"id": str(tmp_path / "tuned"), "dtype": "float32"}}, "the language model's weights are sha256:"),
        ({"lm": {"id": str(tiny_folder), "dtype": "bfloat16"}}, "the language model runs in bfloat16, and was float32"),
        ({"batch_contexts": 5}, "data.batch_contexts is 5, and was 4"),
    ):
        with pytest.raises(DataError, match=what):
            data(**change)
