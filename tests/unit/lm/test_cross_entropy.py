"""`cross_entropy=spliced` in a run: from a cache to the rows of metrics.jsonl, killed and resumed too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented import documented
from killing.compare import run_differences
from rich.console import Console
from torch import Tensor, nn
from warm import Warm

import sparsepilot
from sparsepilot.caching import build_cache
from sparsepilot.data import layout
from sparsepilot.data.cache import Cache
from sparsepilot.data.files import read_json, write_json
from sparsepilot.errors import ConfigError, DataError, SparsepilotError
from sparsepilot.lm.held_out import contexts_of_rows
from sparsepilot.lm.load import load
from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import SplicedCrossEntropy
from sparsepilot.rows import read_rows, rows_of_trainee
from sparsepilot.run import train
from sparsepilot.run_folder import RunFolder

from . import spliced_ranks
from .conftest import SMOLLM2
from .test_load import needs_smollm2
from .test_splice import make_contexts, plain_ce

SITES = ["model.layers.1.mlp:in", "model.layers.1.mlp", "model.layers.2", "model.layers.3"]
Overrides = Callable[..., list[str]]


def build(tiny_folder: Path, folder: Path, **changes: Any) -> Path:
    """A cache of 120 texts through the tiny Llama."""
    folder.mkdir()
    make_words = np.random.default_rng(0)
    for number in range(120):
        words = " ".join(make_words.choice(list("abcdefgh"), 20 + number))
        (folder / f"{number}.txt").write_text(words)
    recipe = {"_target_": "sparsepilot.caching.build_from_lm", "context_length": 16, "dtype": "float32"}
    data = {"path": str(folder / "cache"), "sites": SITES, "build": recipe | {"val_fraction": 0.2} | changes}
    lm = {"id": str(tiny_folder), "gguf": None, "dtype": "float32"}
    build_cache(data, lm, {"source": "files", "paths": [f"{folder}/*.txt"]}, console=Console(quiet=True))
    return folder / "cache"


@pytest.fixture(scope="module")
def cache(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_folder, tmp_path_factory.mktemp("cross-entropy") / "built")


@pytest.fixture
def overrides(cache: Path, tiny_folder: Path, tmp_path: Path) -> Overrides:
    """overrides("model.k=3"): a run of 16 steps, validated at 8 and 16, with cross-entropy at every second step."""

    def make(*more: str, site: str = "model.layers.2") -> list[str]:
        return [
            "data=cache", f"data.path={cache}", f"data.sites=[{site}]", "data.num_streams=8",
            "lm=hf", f"lm.id={tiny_folder}", "lm.dtype=float32", "model.d_sae=64", "model.k=4", "batch=256",
            "samples=4096", "logger=none", "callbacks.validate_every_samples=2048", "callbacks.log_every_steps=1",
            "cross_entropy=spliced", "cross_entropy.tokens=600", "cross_entropy.every_samples=512",
            "cross_entropy.often_tokens=150", f"run_dir={tmp_path}/run", *more,
        ]  # fmt: skip

    return make


def test_a_run_logs_what_its_reconstruction_costs(compose_cfg: Any, overrides: Overrides, tmp_path: Path) -> None:
    summary = train(compose_cfg(*overrides()))
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "val/ce" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 16]
    keys = {f"val/ce{end}" for end in ("", "_se", "_clean", "_zero", "_mean", "_recovered", "_recovered_mean")}
    between = [row for row in rows if "val/fvu" not in row]
    assert [row["step"] for row in between] == [2, 4, 6, 10, 12, 14]
    # (random weights: an ablation need not do harm, and then nothing can be recovered)
    assert all(set(row) <= {"step", "samples", "tokens", *keys} for row in between)
    assert [row["step"] for row in rows if "val/kl" in row] == [16]
    for name in ("val/ce_clean", "val/ce_zero", "val/ce_mean"):
        assert len({row[name] for row in rows}) == 1
    assert len({row["val/ce"] for row in rows}) == 8
    assert summary["metrics"]["val/ce"] == rows[-1]["val/ce"]
    assert {*keys, *summary["metrics"]} <= documented("metrics.jsonl")

    # the same figure from the run folder's dictionary, and the whole model with a hook
    sae = sparsepilot.load(tmp_path / "run")
    lm = load(str(compose_cfg(*overrides()).lm.id), dtype="float32")
    opened = Cache(compose_cfg(*overrides()).data.path)
    start, stop = opened.num_train_rows, opened.num_train_rows + opened.num_val_rows
    contexts = contexts_of_rows(
        lm.tokenizer, 16, opened.tokens(start, stop), opened.positions(start, stop), opened.documents(start, stop)
    )
    mean_D = opened.stats("model.layers.2").mean_D
    spliced = SplicedCrossEntropy(Seam(lm, "model.layers.2", "model.layers.2"), contexts, mean_D, tokens=600)
    again = spliced.measure(lambda x_ND: sae(x_ND))["ce"]
    assert again == pytest.approx(rows[-1]["val/ce"], rel=1e-5)


def test_training_does_not_notice(compose_cfg: Any, overrides: Overrides, tmp_path: Path) -> None:
    train(compose_cfg(*overrides()))
    without_it = [word for word in overrides(f"run_dir={tmp_path}/plain") if not word.startswith("cross_entropy")]
    train(compose_cfg(*without_it))
    with_it, without = (RunFolder(tmp_path / name) for name in ("run", "plain"))
    a, b = (torch.load(f.checkpoints / "last.ckpt", weights_only=True)["state_dict"] for f in (with_it, without))
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], Tensor))
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("val/ce") and k != "val/kl"} for row in read_rows(f.metrics)]
        for f in (with_it, without)
    ]
    assert [row for row in rows[0] if len(row) > 3] == rows[1]


def test_a_transcoder_and_the_rows_that_its_trainee_hears(
    compose_cfg: Any, overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(
        "sparsepilot.training.trainee.Trainee.observe", lambda _, row, samples: heard.append((samples, dict(row))) or {}
    )
    sites = "model.layers.2,model.layers.1.mlp:in,model.layers.1.mlp"  # one more than it needs, in front
    transcoder = "model.sites={read:[model.layers.1.mlp:in],write:[model.layers.1.mlp]}"
    train(compose_cfg(*overrides(transcoder, "trainer.precision=bf16-mixed", site=sites)))
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "val/ce" in row]
    clock = ("step", "samples", "tokens")
    assert heard == [(row["samples"], {k: v for k, v in row.items() if k not in clock}) for row in rows]
    assert len({row["val/ce"] for row in rows}) == 8


@pytest.mark.filterwarnings("ignore:.*binds nothing.*")  # a random model loses nothing by ablation
def test_several_trainees_share_the_language_model_and_measure_as_alone(
    compose_cfg: Any, overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("sparsepilot.cross_entropy.load", lambda **lm: loaded.append(lm["id"]) or load(**lm))
    site = "model.layers.2,model.layers.1.mlp:in,model.layers.1.mlp"
    pareto, constrained = ("+controller@trainees.{}.controller={}".format(*pair) for pair in
                           (("steps", "pareto"), ("held", "constrained")))  # fmt: skip
    fields = {
        # asks at step 6 and is validated; of the others the smaller text is measured there
        "steps": ("model.sites=[model.layers.2]", "controller.targets=[16,12,8]"),
        "held": ("model.sites=[model.layers.2]", "controller.quality=ce_increase", "controller.target=0.01"),
        "over": ("model.sites={read:[model.layers.1.mlp:in],write:[model.layers.1.mlp]}", "model.d_sae=80"),
    }
    given = [f"++trainees.{name}.{field}" for name, own in fields.items() for field in own]
    train(compose_cfg(*overrides(pareto, constrained, "+trainees.none.cross_entropy=null", *given, site=site)))
    assert len(loaded) == 1
    rows, names = list(read_rows(tmp_path / "run" / "metrics.jsonl")), [*fields, "none"]
    assert [row["step"] for row in rows if "steps/val/fvu" in row] == [6, 8, 11, 16]
    for name, own in fields.items():
        controller = {"steps": ["controller=pareto"], "held": ["controller=constrained"]}.get(name, [])
        train(compose_cfg(*overrides(*controller, *own, f"run_dir={tmp_path}/{name}", site=site)))
        assert list(rows_of_trainee(rows, name, names)) == list(read_rows(tmp_path / name / "metrics.jsonl")), name
    assert not any("none/val/ce" in row for row in rows)
    assert any("none/val/fvu" in row for row in rows)


@pytest.mark.parametrize(
    ("more", "site", "message"),
    [
        (("data=synthetic",), None, "cross_entropy: data.build (sparsepilot.data.synthetic.build) makes rows without"),
        (("cross_entropy.tokens=0",), None, "cross_entropy.tokens = 0: should be greater than 0"),
        (("+cross_entropy.token=9",), None, "cross_entropy.token = 9: there is no such field; did you mean 'tokens'"),
        (("cross_entropy.dtype=float16",), None, "cross_entropy.dtype = 'float16': should be"),
        (("cross_entropy.often_tokens=601",), None, "cross_entropy.often_tokens = 601: at most cross_entropy.tokens"),
        (("cross_entropy.every_samples=null",), None, "cross_entropy.often_tokens = 150: nothing is measured between"),
        (("lm.device=abacus",), None, "lm.device='abacus'"),
        (("lm.id=gpt2",), None, "was made with the language model"),
        ((), "model.layers.2,model.layers.1.mlp", "the dictionary has several sites (model.layers.2, model.layers.1.m"),
        ((), "model.layers.*", "a crosscoder of several sites (model.layers.2, model.layers.3)"),
        (("model.sites={read:[model.layers.2],write:[model.layers.1.mlp]}",), "model.layers.2,model.layers.1.mlp",
         "computes model.layers.2 after model.layers.1.mlp"),
        (("cross_entropy.tokens=100000",), None, "cross_entropy.tokens = 100000: the cache's held-out rows make "),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line_before_training(
    compose_cfg: Any, overrides: Overrides, tmp_path: Path, more: tuple[str, ...], site: str | None, message: str
) -> None:
    synthetic = ["data=synthetic", "cross_entropy=spliced", f"run_dir={tmp_path}/run"]
    given = synthetic if "data=synthetic" in more else overrides(*more, site=site or "model.layers.2")
    with pytest.raises(SparsepilotError) as caught:
        train(compose_cfg(*given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_model_of_the_same_name_is_refused(
    compose_cfg: Any, overrides: Overrides, cache: Path, tmp_path: Path
) -> None:
    """A manifest that names other weights; then rows that these weights do not make."""

    def with_source(**changes: Any) -> str:
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(cache, tmp_path / "other")
        manifest = read_json(tmp_path / "other" / layout.MANIFEST_FILE)
        manifest["plan"]["source"].update(changes)
        write_json(tmp_path / "other" / layout.MANIFEST_FILE, manifest)
        return f"data.path={tmp_path}/other"

    with pytest.raises(ConfigError, match=r"its weights are sha256:\w+, the cache .* was made with sha256:0000; give"):
        train(compose_cfg(*overrides(with_source(model_revision="sha256:0000"))))
    with pytest.raises(ConfigError, match="its tokenizer has the hash [0-9a-f]+, the cache .* 0123; give"):
        train(compose_cfg(*overrides(with_source(tokenizer_hash="0123"))))
    moved = with_source()
    arrays = tmp_path / "other" / layout.GROUP_FOLDER / "activations"
    shutil.rmtree(arrays / "model.layers.2")
    shutil.copytree(arrays / "model.layers.1.mlp", arrays / "model.layers.2")
    with pytest.raises(DataError, match=r"activations at model.layers.2 that differ from the cache's rows by"):
        train(compose_cfg(*overrides(moved)))


STEERED = (
    "model=batchtopk", "controller=constrained", "controller.quality=ce_increase", "controller.target=0.02",
    "controller.wait=0.1", "controller.lag_steps=1",
)  # fmt: skip


@pytest.mark.slow  # eight starts of train.py with a language model
@pytest.mark.parametrize("steered", [False, True], ids=["measured", "steered"])
def test_killed_between_two_measurements_it_ends_with_equal_bits(
    overrides: Overrides, warm: Warm, tmp_path: Path, steered: bool
) -> None:
    saving = ("callbacks.checkpoint_every_samples=768", "threads=1", *(STEERED if steered else ()))
    whole, broken = (["train.py", *overrides(*saving, f"run_dir={tmp_path}/{name}")] for name in ("whole", "broken"))
    assert warm(whole, {}).code == 0
    # killed in step 12, after the measurements of steps 10 and 8, and in the measurement's own row of step 14
    for fault in ("mid-step:12", "metrics-append:8"):
        ended = warm(broken, {"SPARSEPILOT_FAULT": fault})
        assert ended.code == -9, ended.out
    ended = warm(broken, {})
    assert ended.code == 0, ended.out
    assert "cross-entropy (validation)" in ended.out
    assert run_differences(tmp_path / "whole", tmp_path / "broken") == []
    if steered:  # from one measurement to the next the set point has moved
        rows = [row for row in read_rows(tmp_path / "broken" / "metrics.jsonl") if "controller/quality" in row]
        assert len({row["controller/quality"] for row in rows}) >= 6
        assert len({round(row["controller/target"], 6) for row in rows}) >= 6


@pytest.mark.slow  # two processes
def test_two_ranks_hold_the_bits_of_one(warm: Warm, tmp_path: Path) -> None:
    for ended in warm.ranks(2, [spliced_ranks.__file__, str(tmp_path / "out")], {}):
        assert ended.code == 0, ended.out
    alone = spliced_ranks.measure()
    for rank in range(2):
        assert torch.load(tmp_path / f"out-{rank}") == alone


@pytest.mark.slow  # three trainings with a language model
def test_cross_entropy_steers_two_ranks_as_it_steers_one(overrides: Overrides, warm: Warm, tmp_path: Path) -> None:
    one, two = (["train.py", *overrides(*STEERED, "threads=1", f"run_dir={tmp_path}/{name}")] for name in ("1", "2"))
    for ended in (warm(one, {}), *warm.ranks(2, [*two, "trainer=ddp_gloo", "trainer.devices=2"], {})):
        assert ended.code == 0, ended.out
    rows, of_two = (list(read_rows(tmp_path / name / "metrics.jsonl")) for name in ("1", "2"))
    assert len(rows) == len(of_two)
    for a, b in zip(rows, of_two, strict=True):
        steered = {key: value for key, value in a.items() if key.startswith(("controller/", "val/ce"))}
        assert {key: b[key] for key in steered} == pytest.approx(steered, rel=1e-5, abs=1e-6)
    assert len({round(row["controller/strength"], 6) for row in rows if "controller/strength" in row}) >= 6


@needs_smollm2
@pytest.mark.lm
@pytest.mark.slow  # whole passes of SmolLM2 in float32
def test_smollm2_from_layer_9_on_is_smollm2(smollm2_unpacked: dict[str, Any]) -> None:
    lm = load(**SMOLLM2, dtype="bfloat16")
    lm = replace(lm, model=lm.model.float(), dtype=torch.float32)
    contexts = make_contexts(num=4, length=32)
    for site in ("model.layers.9", "model.layers.9.mlp"):
        seam = Seam(lm, site, site)
        assert seam.restarts
        assert seam.head_apart
        tokens = int(contexts.predicted_CL.sum())
        ce = SplicedCrossEntropy(seam, contexts, torch.zeros(576), tokens=tokens, batch_contexts=2)

        def worse(x_ND: Tensor) -> Tensor:
            return 0.9 * x_ND + 0.05 * x_ND.roll(1, dims=1)

        found = ce.measure(worse)
        assert found["ce"] == pytest.approx(plain_ce(lm, contexts, site, worse), rel=1e-5)
        assert found["ce_zero"] == pytest.approx(plain_ce(lm, contexts, site, torch.zeros_like), rel=1e-5)
        assert ce.measure(nn.Identity())["ce"] == found["ce_clean"]
        tokens_CL = torch.from_numpy(contexts.tokens_CL).long()
        predicted_CL = torch.from_numpy(contexts.predicted_CL)
        labels_CL = torch.full_like(tokens_CL, -100)
        labels_CL[:, 1:][predicted_CL[:, :-1]] = tokens_CL[:, 1:][predicted_CL[:, :-1]]
        own = float(lm.model(input_ids=tokens_CL, labels=labels_CL, use_cache=False).loss)
        assert found["ce_clean"] == pytest.approx(own, rel=1e-5)
