"""Evaluation of a run's saved dictionary, beside plain restatements on whole passes of the language model."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from torch import Tensor

import sparsepilot
from sparsepilot.analysis.evaluate import EVALUATION, LATENTS, evaluate, open_subject
from sparsepilot.analysis.pairs import coded
from sparsepilot.analysis.source import held_out_contexts
from sparsepilot.analysis.text import measure_text
from sparsepilot.data.cache import Cache
from sparsepilot.errors import ConfigError, SparsepilotError
from sparsepilot.interop.export import export
from sparsepilot.interop.formats.refuse import Names
from sparsepilot.lm.load import load
from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import SplicedCrossEntropy
from sparsepilot.metrics.firing import LOG10_EDGES
from sparsepilot.run import train

from .test_cross_entropy import build
from .test_splice import make, make_contexts, plain_ce

SITE = "model.layers.2"


@pytest.fixture(scope="module")
def cache(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_folder, tmp_path_factory.mktemp("evaluate") / "built")


def run_of(compose_cfg: Any, cache: Path, lm: Path, run: Path, *more: str, site: str = SITE) -> Path:
    train(
        compose_cfg(
            "data=cache", f"data.path={cache}", f"data.sites=[{site}]", "data.num_streams=8", "lm=hf", f"lm.id={lm}",
            "lm.dtype=float32", "model.d_sae=64", "model.k=4", "batch=256", "samples=4096", "logger=none",
            "report=false", f"run_dir={run}", *more,
        )
    )  # fmt: skip
    return run


@pytest.fixture
def run(compose_cfg: Any, cache: Path, tiny_folder: Path, tmp_path: Path) -> Path:
    return run_of(compose_cfg, cache, tiny_folder, tmp_path / "run")


def plain_quality(y: Tensor, y_hat: Tensor, codes: Tensor, mean: Tensor) -> dict[str, float]:
    """Every figure of a set of rows, each in a line, in fp64."""
    y, y_hat, mean = y.double(), y_hat.double(), mean.double()
    error = (y - y_hat).square().sum()
    return {
        "num_rows": len(y),
        "l0": float((codes != 0).sum(1).double().mean()),
        "fvu": float(error / (y - mean).square().sum()),
        "fvu_own_mean": float(error / (y - y.mean(0)).square().sum()),
        "mse": float((y - y_hat).square().mean()),
        "cosine": float(torch.cosine_similarity(y, y_hat).mean()),
        "norm_ratio": float((y_hat.norm(dim=1) / y.norm(dim=1)).mean()),
    }


@torch.no_grad()
def test_rows_latents_and_text_are_what_their_formulas_say(run: Path, cache: Path, tiny_folder: Path) -> None:
    subject = open_subject(str(run))
    found, each = evaluate(subject, tokens=None, rows=None, batch_contexts=3)
    sae, opened, lm = sparsepilot.load(run), Cache(cache), load(str(tiny_folder), dtype="float32")
    first = opened.num_train_rows
    x = opened.read(SITE, first, first + opened.num_val_rows).float()
    mean = opened.stats(SITE).mean_D
    codes = sae.encode(x)
    assert found["rows"] == pytest.approx(plain_quality(x, sae.decode(codes), codes, mean), rel=1e-4)
    summary = json.loads((run / "summary.json").read_text())["metrics"]
    assert found["rows"]["fvu"] == pytest.approx(summary["val/fvu"], rel=1e-4)  # one definition
    assert found["latents"]["dead"] == summary["train/dead_latents"]
    assert found["latents"]["dead_window_samples"] == 409

    density = (codes != 0).double().mean(0)
    assert each["density"] == pytest.approx(density.tolist(), rel=1e-5)
    assert each["max"] == pytest.approx(codes.amax(0).tolist(), rel=1e-4)
    active_mean = [float(c[c != 0].mean()) if bool((c != 0).any()) else 0.0 for c in codes.T]
    assert each["mean"] == pytest.approx(active_mean, rel=1e-4)
    latents = found["latents"]
    assert latents["inactive"] == int((density == 0).sum())
    assert latents["dense"] == int((density > 0.1).sum()) > 0
    logs = density[density > 0].log10().numpy()
    assert latents["firing_density_histogram"] == np.histogram(logs, LOG10_EDGES)[0].tolist()

    # the text: every context, whole passes one at a time
    contexts = held_out_contexts(opened, lm, "test")
    rows, every = [], []
    for tokens_L, mask_L in zip(contexts.tokens_CL, contexts.mask_CL, strict=True):
        kept: list[Tensor] = []
        handle = lm.model.get_submodule(SITE).register_forward_hook(lambda _, __, out: kept.append(out[0]))  # noqa: B023
        lm.model(torch.from_numpy(tokens_L[None].astype(np.int64)), use_cache=False)
        handle.remove()
        rows.append(kept[0][torch.from_numpy(mask_L)])
        every.append(kept[0][: int(np.flatnonzero(mask_L)[-1]) + 1])
    predicted = contexts.predicted_CL.any(axis=1)
    for name, parts in (("without_special_tokens", rows), ("with_special_tokens", every)):
        y = torch.cat([part for part, used in zip(parts, predicted, strict=True) if used])
        codes = sae.encode(y)
        assert found[name] == pytest.approx(plain_quality(y, sae.decode(codes), codes, mean), rel=1e-4), name
    assert found["with_special_tokens"]["num_rows"] > found["without_special_tokens"]["num_rows"] + predicted.sum() - 1
    clean = plain_ce(lm, contexts)
    assert found["language_model"]["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert found["language_model"]["ce"] == pytest.approx(plain_ce(lm, contexts, SITE, sae), rel=1e-5)
    assert found["language_model"]["ce_zero"] == pytest.approx(plain_ce(lm, contexts, SITE, torch.zeros_like), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_agrees_with_the_measurement_of_training(name: str) -> None:
    """The same figures from `SplicedCrossEntropy`, on part of the text, of a transcoder with a skip."""
    from .test_attach import WIDTH, dictionary

    lm, contexts, mean_D = make(name), make_contexts(num=20, length=24), torch.linspace(-1, 1, WIDTH)
    sae = dictionary("jumprelu", skip=True, blocks="transcoder")
    layers = {"llama": "model.layers", "gpt2": "transformer.h"}[name]
    seam = Seam(lm, f"{layers}.1.mlp:in", f"{layers}.1.mlp")
    figures = measure_text(sae, seam, contexts, mean_D, tokens=90, batch_contexts=3)
    expected = SplicedCrossEntropy(seam, contexts, mean_D, tokens=90, batch_contexts=3).measure(sae, last=True)
    del expected["correction"]  # what training carries along
    assert figures.language_model == pytest.approx(expected, rel=1e-5)
    assert figures.text["num_predictions"] < int(contexts.predicted_CL.sum())
    everywhere = figures.sae_lens["ce_loss_with_ablation"]
    assert everywhere != pytest.approx(expected["ce_zero"], rel=1e-3)  # special positions have a say


@torch.no_grad()
def test_a_perfect_dictionary_costs_nothing() -> None:
    from .test_attach import dictionary

    lm, contexts = make("llama"), make_contexts()
    sae = dictionary("relu", skip=True, blocks="transcoder")
    for parameter in sae.parameters():
        parameter.zero_()
    sae.W_skip.copy_(torch.eye(32))
    figures = measure_text(sae, Seam(lm, SITE, SITE), contexts, torch.ones(32), tokens=None)
    assert figures.with_special_tokens["fvu"] == 0
    assert figures.with_special_tokens["l0"] == 0
    assert figures.with_special_tokens["norm_ratio"] == pytest.approx(1, abs=1e-6)
    assert figures.language_model["ce"] == figures.language_model["ce_clean"]
    assert figures.language_model["kl"] == 0


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_pairs_are_the_codes(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from .test_attach import dictionary

    sae, x = dictionary(architecture, skip=True, blocks="transcoder"), torch.randn(50, 32)
    x[7] = 0
    for sparse_below in (0.0, 1.1):
        monkeypatch.setattr("sparsepilot.analysis.pairs._SPARSE_BELOW", sparse_below)
        monkeypatch.setattr("sparsepilot.analysis.pairs._CODES", 40 * 16)  # parts of 16 rows, and one of 2
        parts = list(coded(sae, x))
        assert [part.num_rows for part in parts] == [16, 16, 16, 2]
        assert torch.allclose(torch.cat([part.y_hat_BD for part in parts]), sae(x), atol=1e-5)
        codes = torch.zeros(50, 40)
        for part in parts:
            codes[part.rows.start + part.rows_P, part.ids_P] = part.values_P
        assert torch.allclose(codes, sae.encode(x), atol=1e-6)


def script(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")


def test_the_script_writes_files_and_a_row_per_run(
    compose_cfg: Any, run: Path, cache: Path, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.rmtree(run / "checkpoints")  # nothing of them is needed
    planted = tmp_path / "planted"
    train(compose_cfg("data=synthetic", "data.build.num_rows=6000", "data.build.num_val_rows=5000",
                      "data.build.d_in=16", f"data.path={tmp_path}/rows", "data.num_streams=8", "model.d_sae=64",
                      "batch=256", "samples=512", "logger=none", "report=false", f"run_dir={planted}"))  # fmt: skip
    capsys.readouterr()
    script(monkeypatch, f"run_dir=[{run},{planted}]", "lm=none")
    out = capsys.readouterr().out
    assert "FVU" in out
    assert "CE" not in out
    assert str(planted / EVALUATION) in out
    for folder, rows in ((run, Cache(cache).num_val_rows), (planted, 5000)):
        found = json.loads((folder / EVALUATION).read_text())
        assert found["rows"]["num_rows"] == rows
        assert all(len(values) == 64 for values in json.loads((folder / LATENTS).read_text()).values())
    script(monkeypatch, f"run_dir={run}", "tokens=200", "rows=100", f"out={tmp_path}/elsewhere")
    assert "clean CE" in capsys.readouterr().out
    found = json.loads((tmp_path / "elsewhere" / EVALUATION).read_text())
    assert found["rows"]["num_rows"] == 100
    assert 200 <= found["language_model"]["num_predictions"] < 300


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"lm": {"id": "gpt2"}}, {}, "was made with the language model"),
    ({"lm": "gpt2"}, {}, "lm = gpt2: give lm=none"),
    ({"lm": {"nonsense": 1}}, {}, "nonsense"),
    ({"cache": "nowhere"}, {}, "nowhere: no activation cache here"),
    ({}, {"tokens": 0}, "tokens = 0: a positive integer is needed"),
    ({}, {"rows": "all"}, "rows = all: a positive integer is needed"),
]


def test_what_cannot_be_evaluated_is_one_line(run: Path) -> None:
    for options, sizes, message in WRONG:
        with pytest.raises(SparsepilotError) as caught:
            evaluate(open_subject(str(run), **options), **sizes)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    for name, text, message in [
        ("summary.json", '{"metrics":', "summary.json: is damaged"),
        ("summary.json", '{"metrics": [1]}', "summary.json: metrics is [1], an object with fields is needed"),
        ("config.yaml", "a: [", "config.yaml: is damaged"),
        ("config.yaml", "", "config.yaml: is no configuration of a run"),
        ("config.yaml", "data: 5", "config.yaml: data is 5, an object with fields is needed"),
        ("config.yaml", "data: {path: 5}", "its data.path is 5"),
    ]:
        good = (run / name).read_text()
        (run / name).write_text(text)
        with pytest.raises(ConfigError) as refused:
            open_subject(str(run))
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
        (run / name).write_text(good)
    assert not (run / EVALUATION).exists()


def test_a_run_without_a_language_model_or_with_other_rows(
    compose_cfg: Any, run: Path, cache: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    sites = "model.layers.2,model.layers.3"
    crosscoder = run_of(compose_cfg, cache, tiny_folder, tmp_path / "crosscoder", site=sites)
    with pytest.raises(
        ConfigError, match=r"a dictionary of several sites \(model.layers.2, model.layers.3\) has no one"
    ):
        evaluate(open_subject(str(crosscoder)))
    found, _ = evaluate(open_subject(str(crosscoder), lm="none"))
    assert set(found) & {"language_model", "with_special_tokens", "sae_lens"} == set()
    other = build(tiny_folder, tmp_path / "other", val_fraction=0.1)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(cache), str(other)))
    with pytest.raises(ConfigError, match="is not the one that it was trained on"):
        open_subject(str(run))
    assert evaluate(open_subject(str(run), cache=str(other)))[0]["cache"] == str(other)
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"is no run .* give cache="):
        open_subject(str(run))
    with pytest.raises(ConfigError, match=r"does not say where the language model .* give lm.id="):
        evaluate(open_subject(str(run), cache=str(cache)))


@pytest.mark.parametrize(
    ("format", "change", "site"),
    [
        ("saelens", {}, None),
        ("sparsify", {}, None),
        ("saelens", {"sites": ["lm_head"]}, SITE),  # a place that only the user can name
        ("dictionary_learning", {}, None),
    ],
)
def test_an_export_is_evaluated_like_its_run(
    run: Path, cache: Path, tmp_path: Path, format: str, change: dict[str, Any], site: str | None
) -> None:
    sae = sparsepilot.load(run)
    sae.cfg |= change
    names = Names("hook_of_my_own" if change else None)
    folder = tmp_path / "out" / export([sae], format, tmp_path / "out", names).folder
    for more in ({}, {"lm": "none"}):
        options = {"cache": str(cache), "lm": lm_of(run), **more}
        found, _ = evaluate(open_subject(str(folder), **options, site=site), tokens=100, rows=300)
        expected, _ = evaluate(open_subject(str(run), lm=more.get("lm")), tokens=100, rows=300)
        assert found["sites"] == found["sites_out"] == [SITE]
        for section in set(expected) & {"rows", "language_model"}:
            numbers = {name: value for name, value in expected[section].items() if isinstance(value, float)}
            assert {name: found[section][name] for name in numbers} == pytest.approx(numbers, rel=1e-3), section
    if site is not None:
        with pytest.raises(ConfigError, match=r"'hook_of_my_own' is none that the cache .* has; .* give site="):
            open_subject(str(folder), cache=str(cache))
        with pytest.raises(ConfigError, match=r"^site = model.layers.9: the cache .* did you mean 'model.layers"):
            open_subject(str(folder), cache=str(cache), site="model.layers.9")


def lm_of(run: Path) -> dict[str, Any]:
    """The language model of a run, as its configuration has it."""
    return dict(OmegaConf.load(run / "config.yaml").lm)
