"""scripts/features.py on a run over a tiny Llama: what it says, killed and gone on with, and looked at in a browser."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel
from warm import Warm

import sparsepilot
from sparsepilot.analysis.features.build import NUM_PICKED, build
from sparsepilot.analysis.features.page import PAGE, PageWriter
from sparsepilot.analysis.features.records import Context, Record
from sparsepilot.analysis.features.source import token_texts, unembedding
from sparsepilot.analysis.features.survey import NUM_BINS, bin_edges
from sparsepilot.data.cache import Cache
from sparsepilot.errors import ConfigError, DataError, SparsepilotError
from sparsepilot.lm.load import LanguageModel
from sparsepilot.run import train

from .test_cross_entropy import build as build_cache

QUIET = Console(quiet=True)
LATENTS = 96


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 96 latents, whose cache of 8,000 rows has shards of 1,024."""
    from hydra import compose, initialize_config_dir

    from sparsepilot.config.resolvers import register_resolvers
    from sparsepilot.config.schema import register

    folder = tmp_path_factory.mktemp("features")
    cache = build_cache(tiny_folder, folder / "built", chunk_rows=64, shard_rows=1024)
    register()
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[
            "data=cache", f"data.path={cache}", "data.sites=[model.layers.2]", "data.num_streams=8", "lm=hf",
            f"lm.id={tiny_folder}", "lm.dtype=float32", f"model.d_sae={LATENTS}", "model.k=4", "batch=256",
            "samples=8192", "logger=none", "report=false", f"run_dir={folder}/run",
        ])  # fmt: skip
    train(cfg)
    return folder / "run"


@pytest.fixture(scope="module")
def built(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script makes of the run, all in one go."""
    return build(str(run), str(tmp_path_factory.mktemp("built") / "features"), console=QUIET).parent


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "features.jsonl").read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def test_the_listing_says_what_the_dictionary_does(run: Path, built: Path) -> None:
    sae = sparsepilot.load(run)
    cache = Cache(run.parent / "built" / "cache")
    num_rows = cache.num_train_rows + cache.num_val_rows
    codes_NF = sae.encode(cache.read("model.layers.2", 0, num_rows)).numpy()
    tokens = cache.tokens(0, num_rows)
    words = dict(enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"]))
    lines = listed(built)
    assert [line["latent"] for line in lines] == list(range(LATENTS))
    assert json.loads((built / "features.json").read_text())["rows"] == num_rows
    scored = [line for line in lines if line["score"] is not None]
    assert len(scored) > LATENTS / 2
    for line in lines:
        fired = codes_NF[:, line["latent"]]
        assert line["fires"] == (fired > 0).sum() == sum(line["histogram"]["counts"])
        assert line["max_activation"] == pytest.approx(fired.max(), rel=1e-3)
        if not line["fires"]:
            assert line["top_contexts"] == []
            continue
        assert line["mean_activation"] == pytest.approx(fired[fired > 0].mean(), rel=1e-3)
        for context in [*line["top_contexts"], *chain(*line["quantile_contexts"].values())]:
            first = context["row"] - context["peak"]
            rows = range(first, first + len(context["tokens"]))
            assert [text.strip() for text in context["tokens"]] == [words[tokens[row]] for row in rows]
            assert context["activations"] == pytest.approx([fired[row] for row in rows], rel=1e-3, abs=1e-4)
        assert line["top_contexts"][0]["activations"][line["top_contexts"][0]["peak"]] == line["max_activation"]
    picked = json.loads((built / "sample.json").read_text())
    assert len(picked) == NUM_PICKED
    assert [row["score"] for row in picked] == sorted((row["score"] for row in picked), reverse=True)


@torch.no_grad()
def test_the_lens_is_the_models_own_head(lm: LanguageModel) -> None:
    """Logits times the root mean square that the norm divides by are the folded matrix times x, up to a constant."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=32, n_layer=1, n_head=2))
    for name, parameter in gpt2.transformer.ln_f.named_parameters():
        parameter.copy_(torch.randn(32) * (1.0 if name == "bias" else 0.3) + 1)
    for model, norm, centred in (
        (lm.model, lm.model.model.norm, False),
        (gpt2, gpt2.transformer.ln_f, True),
    ):
        W_VD = unembedding(LanguageModel(model, None, "", "", torch.float32))
        x_BD, y_BD = torch.randn(2, 5, 32)
        sizes = []
        for each in (x_BD, y_BD):
            deviation = each - each.mean(dim=1, keepdim=True) if centred else each
            sizes.append((deviation.square().mean(dim=1, keepdim=True) + 1e-5).sqrt())
        beta = getattr(norm, "bias", None)
        head = model.get_output_embeddings().weight
        constant_V = 0 if beta is None else head @ beta
        logits_BV = sizes[0] * (norm(x_BD) @ head.T - constant_V) - sizes[1] * (norm(y_BD) @ head.T - constant_V)
        wanted_BV = logits_BV - logits_BV.mean(dim=1, keepdim=True)
        torch.testing.assert_close((x_BD - y_BD) @ W_VD.T, wanted_BV, rtol=1e-3, atol=1e-4)


def test_token_texts_keep_their_spaces(lm: LanguageModel) -> None:
    texts = token_texts(lm.tokenizer, 14)
    assert texts[3:5] == [" a", " b"]  # this tokenizer puts a space between words
    assert texts[11:] == ["<11>", "<12>", "<13>"]


@pytest.mark.slow  # three processes that load a language model
def test_killed_in_the_pass_and_while_writing_it_ends_the_same(
    run: Path, built: Path, warm: Warm, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    command = ["scripts/features.py", f"run_dir={run}", f"out={out}", "save_every_s=0"]
    for fault in ("features-pass:3", "features-write"):
        assert warm.script(command, SPARSEPILOT_FAULT=fault).returncode == -signal.SIGKILL
        assert not out.exists()
    done = warm.script(command)
    assert done.returncode == 0, done.stderr
    total = json.loads((built / "features.json").read_text())["rows"]
    assert f"going on after {total:,} of {total:,} rows" in done.stdout  # the pass was whole before the second kill
    assert done.stdout.splitlines()[-1] == str(out / PAGE)
    assert content(out) == content(built)
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_a_build_takes_the_place_of_an_older_one_but_of_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    build(str(run), str(out), rows=2000, console=QUIET)
    first = json.loads((out / "features.json").read_text())
    assert first["rows"] == 2000
    build(str(run), str(out), rows=1000, seed=1, console=QUIET)
    assert json.loads((out / "features.json").read_text())["rows"] == 1000
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"^out = .*mine: is there already and holds something else"):
        build(str(run), str(tmp_path / "mine"), console=QUIET)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_what_cannot_be_described_is_one_clear_line(
    run: Path, tiny_folder: Path, train_tiny: Any, tmp_path: Path
) -> None:
    train_tiny()
    other = build_cache(tiny_folder, tmp_path / "other", context_length=8)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"run_dir": str(tmp_path / "none")}, r"^run_dir = .*none: there is no run here"),
        ({"run_dir": str(tmp_path / "run")}, r"^run_dir = .*: the cache at .* was not made by a language model"),
        ({"run_dir": str(run), "rows": 0}, r"^rows = 0: should be a whole number of at least 1"),
        ({"run_dir": str(run), "rows": "some"}, r"^rows = some: should be"),
        ({"run_dir": str(run), "seed": -1}, r"^seed = -1: should be"),
        ({"run_dir": str(run), "save_every_s": "abc"}, r"^save_every_s = abc: should be seconds"),
        ({"run_dir": str(run), "cache": str(tmp_path / "gone")}, r"gone: no activation cache here"),
    ]
    for given, message in cases:
        with pytest.raises(SparsepilotError, match=message) as caught:
            build(**given, out=str(tmp_path / "out"), console=QUIET)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    build(str(run), str(tmp_path / "out"), cache=str(other), console=QUIET)  # of the same model and sites

    sae = json.loads((run / "sae.json").read_text())
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("checkpoints"))
    (broken / "sae.json").write_text(json.dumps({name: sae[name] for name in sae if name != "sites"}))
    with pytest.raises(ConfigError, match=r"sae\.json does not name the sites"):
        build(str(broken), str(tmp_path / "second"), console=QUIET)

    config = run / "config.yaml"
    text = config.read_text()
    try:
        config.write_text(text.replace(str(tiny_folder), str(tmp_path)))
        with pytest.raises(ConfigError, match=r"its lm\.id is .*, the cache at .* was made with"):
            build(str(run), str(tmp_path / "second"), console=QUIET)
        config.write_text(text.replace("built/cache", "nowhere"))
        with pytest.raises(DataError, match="nowhere: no activation cache here"):
            build(str(run), str(tmp_path / "second"), console=QUIET)
    finally:
        config.write_text(text)


websocket = pytest.importorskip("websocket", reason="needs websocket-client")

from browser import Browser, browser, find_chromium  # noqa: E402 - needs the line above

READY = "document.documentElement.dataset.shown"
ROWS = "[...document.querySelectorAll('#list .row')].map((r) => Number(r.dataset.id))"
in_browser = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def settle(page: Browser, script: str) -> list[int]:
    """Does something that arranges the list anew, and gives the latents that are listed then."""
    before = page.value("Number(document.documentElement.dataset.arranged)")
    page.value(script)
    for _ in range(300):
        if page.value("Number(document.documentElement.dataset.arranged)") > before:
            return page.value(ROWS)
        page.value("new Promise((resolve) => setTimeout(resolve, 20))")
    raise AssertionError(f"nothing happened after {script}; console: {page.complaints}")


def search(page: Browser, text: str) -> list[int]:
    find = "document.getElementById('search')"
    return settle(page, f"(() => {{const s = {find}; s.value = {json.dumps(text)}; s.oninput();}})()")


def sort(page: Browser, by: str) -> list[int]:
    return settle(page, f"(() => {{const s = document.getElementById('sort'); s.value = '{by}'; s.onchange();}})()")


@in_browser
@pytest.mark.slow  # starts a browser, whose pages take seconds on a shared core
def test_search_finds_sorting_sorts_and_pages_load(page: Browser, built: Path) -> None:
    lines = listed(built)
    page.complaints.clear()
    page.requests.clear()
    page.open(built / PAGE, READY)
    page.call("Emulation.setDeviceMetricsOverride", width=1400, height=5000, deviceScaleFactor=1, mobile=False)
    cards = page.value("[...document.querySelectorAll('.gallery .card b')].map((b) => Number(b.textContent))")
    assert cards == [row["latent"] for row in json.loads((built / "sample.json").read_text())]

    keys = {"density": "density", "max": "max_activation", "score": "score"}
    for by, key in keys.items():
        values = [-1 if line[key] is None else float(np.float32(line[key])) for line in lines]
        wanted = sorted(range(LATENTS), key=lambda latent: (-values[latent], latent))
        assert sort(page, by) == wanted
    cosines = [float(np.float32(line["nearest"][0]["cosine"])) for line in lines]
    assert sort(page, "cosine") == sorted(range(LATENTS), key=lambda latent: (-cosines[latent], latent))
    assert settle(page, "document.getElementById('turn').click()")[0] == int(np.argmin(cosines))
    assert sort(page, "id") == list(range(LATENTS))

    def fires(word: str) -> set[int]:
        found = set()
        for line in lines:
            peaks = [context["tokens"][context["peak"]].strip() for context in line["top_contexts"]]
            if peaks and peaks.count(word) >= len(peaks) / 4:
                found.add(line["latent"])
        return found

    def promotes(word: str) -> set[int]:
        return {line["latent"] for line in lines if word in [each["token"].strip() for each in line["promotes"]]}

    assert 0 < len(fires("c")) < LATENTS
    assert set(search(page, " C ")) == fires("c")
    click = "document.querySelector('[data-where={}]').click()"
    assert set(settle(page, click.format("promotes"))) == promotes("c")
    assert settle(page, click.format("fires")) == sorted(fires("c"))
    assert search(page, "17") == [17]
    assert search(page, "nothing like it") == []
    assert page.value("document.getElementById('count').textContent") == f"0 of {LATENTS} latents"
    assert search(page, "") == list(range(LATENTS))

    most = max(lines, key=lambda line: line["fires"])
    for line in (most, lines[0], lines[-1]):
        page.value(f"location.hash = '#{line['latent']}'")
        page.wait_for(f"document.documentElement.dataset.shown === '{line['latent']}'")
        assert page.value("document.querySelector('main h1').textContent") == f"Latent {line['latent']}"
        texts = page.value("[...document.querySelectorAll('.texts .line')].map((l) => l.textContent)")
        contexts = [*line["top_contexts"], *chain(*line["quantile_contexts"].values())]
        assert texts == ["".join(context["tokens"]) for context in contexts]
        shades = page.value("[...document.querySelectorAll('.texts .context:first-of-type .hot, "
                            ".texts .context:first-of-type .peak')].length")  # fmt: skip
        assert shades == sum(value > 0 for value in contexts[0]["activations"])
        bars = page.value("[...document.querySelectorAll('#histogram .bar')].length")
        assert bars == len(line["histogram"]["counts"])
        words = page.value("[...document.querySelectorAll('#words .pair .by')].map((w) => w.textContent)")
        assert words[0] == f"{line['promotes'][0]['logit']:.2f}"
        near = page.value("[...document.querySelectorAll('#near .row')].map((r) => Number(r.dataset.id))")
        assert near == [each["latent"] for each in line["nearest"]]
    page.value("document.querySelector('.head .go button').click()")
    page.wait_for("document.documentElement.dataset.shown === 'overview'")
    page.value("document.querySelector('.head .go button').click()")  # draw others
    page.wait_for("document.querySelector('h1').textContent.includes('of the list')")
    assert page.value("document.querySelectorAll('.gallery .card').length") == NUM_PICKED
    grounds = []
    for _ in range(2):
        grounds.append(page.value("getComputedStyle(document.body).backgroundColor"))
        page.value("document.getElementById('theme').click()")
    assert len(set(grounds)) == 2
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@in_browser
@pytest.mark.slow  # writes 1,024 chunks of latents, and starts a browser
def test_a_page_of_65536_latents_draws_what_is_looked_at(page: Browser, tmp_path: Path) -> None:
    num, texts = 65_536, [f" word{i}" for i in range(5000)]
    writer = PageWriter(tmp_path, texts)

    def record(latent: int) -> Record:
        contexts = [Context(latent, 3, [(latent + i) % 5000 for i in range(6)], [0.0, 0.0, 0.0, 2.5, 0.0, 1.0])] * 5
        words, near = [(latent % 5000, 1.0)], [((latent + 1) % num, 0.5)]
        return Record(
            latent, 5, latent / num, 2.5, 2.0, None, [0] * (NUM_BINS - 1) + [5], words, words, near, contexts, [[]] * 4
        )

    for latent in range(num):
        writer.add(record(latent))
    about = {"run": "large", "model": "none", "sites": ["a"], "architecture": "topk", "latents": num, "fired": num,
             "rows": 10**9, "l0": 32, "edges": bin_edges().tolist(), "best": 200, "seed": 0, "lens": True}  # fmt: skip
    writer.finish([record(latent) for latent in range(20)], about)
    page.complaints.clear()
    page.requests.clear()
    page.open(tmp_path / PAGE, READY)
    loaded = {Path(url).name for url in page.requests if url.endswith(".js")}
    assert loaded == {"index.js", "picked.js"}
    assert page.value("performance.now()") < 20_000  # 2 s on a free machine (docs/log.md); what is not, is far slower
    assert sort(page, "density")[:3] == [65_535, 65_534, 65_533]
    assert page.value("document.querySelectorAll('#list .row').length") < 250
    page.value("document.getElementById('list').scrollTop = 40000 * 32")
    page.wait_for(f"{ROWS}.includes(65535 - 40000)")
    assert page.value("document.querySelectorAll('#list .row').length") < 250
    page.value("location.hash = '#40000'")
    page.wait_for("document.documentElement.dataset.shown === '40000'")
    assert search(page, "word4321")[:2] == [64_318, 59_318]  # whose tokens at their peak, 3 on, are this one
    more = {Path(url).name for url in page.requests if url.endswith(".js")} - loaded
    assert more == {"latents-625.js", "search.js"}
    assert page.complaints == []
