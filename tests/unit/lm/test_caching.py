"""Building caches by their recipes, and from a language model to a trained dictionary: two writers, one of them
killed, then a run on what they wrote.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from warm import Warm

import sparsepilot
from sparsepilot.caching import build_cache, check_recipe
from sparsepilot.config.check import check_cache
from sparsepilot.data import layout
from sparsepilot.data.cache import Cache
from sparsepilot.data.files import read_json, write_json
from sparsepilot.data.sites import expand_sites as sites_of_cache
from sparsepilot.errors import DataError
from sparsepilot.lm import text as lm_text
from sparsepilot.lm.capture import expand_sites
from sparsepilot.lm.load import LanguageModel
from sparsepilot.run import train

QUIET = Console(quiet=True)
FROM_LM = {
    "_target_": "sparsepilot.caching.build_from_lm",
    "context_length": 16,
    "dtype": "float32",
    "batch_contexts": 4,
}
SYNTHETIC = {"_target_": "sparsepilot.data.synthetic.build", "num_rows": 3000, "num_val_rows": 200, "d_in": 8}
SYNTHETIC |= {"num_features": 16, "mean_active": 2, "noise": 0.1, "seed": 0}
Groups = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def groups(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Groups:
    """The groups data, lm and text of a cache that is built and sealed."""
    folder = tmp_path_factory.mktemp("caching")
    for number in range(12):
        words = " ".join("abcdefgh"[(number + i * i) % 8] for i in range(9 + number))
        (folder / f"{number}.txt").write_text(words)
    data = {"path": str(folder / "cache"), "sites": ["model.layers.*.mlp", "model.layers.2"], "build": FROM_LM}
    lm = {"id": str(tiny_folder), "gguf": None, "dtype": "float32"}
    made = data, lm, {"source": "files", "paths": [f"{folder}/*.txt"]}
    assert build_cache(*made, console=QUIET) is not None
    return made


def changed(groups: Groups, field: str, value: Any) -> Groups:
    """The same groups with one field, named as in the configuration, set to another value."""
    data, lm, text = ({**group} for group in groups)
    top, *rest = field.split(".")
    if rest[0] == "build":
        data["build"] = {**data["build"], rest[1]: value}
    else:
        {"data": data, "lm": lm, "text": text}[top][rest[0]] = value
    return data, lm, text


@pytest.mark.parametrize(
    ("field", "value", "was"),
    [
        ("data.build.dtype", "int8", "'float32'"),
        ("data.build.context_length", 32, "16"),
        ("data.build.max_tokens", 100, "None"),
        ("data.build.val_fraction", 0.5, "0.05"),
        ("data.build.chunk_rows", 48, "[0-9]+"),
        ("data.sites", ["model.layers.*"], r"\['model.layers.\*.mlp', 'model.layers.2'\]"),
        ("lm.id", "gpt2", "'.*tiny-llama.*'"),
        ("lm.gguf", "/models/other.gguf", "None"),
        ("lm.revision", "v2", "None"),
        ("lm.dtype", "bfloat16", "'float32'"),
        ("text.source", "python_docs", "'files'"),
        ("text.paths", ["other/*.txt"], ".*"),
        ("text.max_documents", 5, "None"),
    ],
)
def test_another_recipe_than_the_caches_is_refused(groups: Groups, field: str, value: Any, was: str) -> None:
    shown = value if field != "lm.gguf" else "other.gguf"
    with pytest.raises(DataError) as caught:
        check_recipe(*changed(groups, field, value))
    assert str(caught.value).startswith(f"{field} = {shown!r}: the cache at data.path = {groups[0]['path']} was built")
    assert re.search(f"was built with {was}; choose another data.path to build one there, or", str(caught.value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.path", "nothing/here"),
        ("data.sites", ["model.layers.1.mlp", "model.layers.2:out"]),
        ("data.build.batch_contexts", 8),
        ("data.build.chunk_rows", 0),
        ("lm.dtype", "auto"),
        ("text.field", "text"),
    ],
)
def test_what_the_cache_meets_is_accepted(groups: Groups, field: str, value: Any) -> None:
    check_recipe(*groups)
    check_recipe(*changed(groups, field, value))
    check_recipe({**groups[0], "build": None}, {}, {})


def test_a_cache_of_before_recipes_were_recorded(groups: Groups, tmp_path: Path) -> None:
    older = changed(groups, "data.path", str(tmp_path / "older"))
    shutil.copytree(groups[0]["path"], tmp_path / "older")
    plan = read_json(tmp_path / "older" / layout.PLAN_FILE)
    del plan["source"]["recipe"]
    write_json(tmp_path / "older" / layout.PLAN_FILE, plan)
    manifest = read_json(tmp_path / "older" / layout.MANIFEST_FILE)
    write_json(tmp_path / "older" / layout.MANIFEST_FILE, {**manifest, "plan": plan})
    check_recipe(*changed(older, "data.build.max_tokens", 100))  # cannot be told
    with pytest.raises(DataError, match="data.build.context_length = 32"):
        check_recipe(*changed(older, "data.build.context_length", 32))
    assert build_cache(*older, console=QUIET) is not None  # the same plan still


def test_a_synthetic_cache_is_shown_shared_and_held_to_its_recipe(groups: Groups, tmp_path: Path) -> None:
    data = {
        "path": str(tmp_path / "c"),
        "sites": ["synthetic"],
        "build": {**SYNTHETIC, "shard_rows": 512, "chunk_rows": 64},
    }
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert build_cache(data, {}, {}, rank=1, world=2, console=screen) is None
    assert build_cache(data, {}, {}, rank=0, world=2, console=screen) is not None
    assert "making rows" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "1664/1664" in screen.file.getvalue()  # type: ignore[attr-defined]
    check_recipe(data, {}, {})
    for field, value, was in [
        ("d_in", 32, "8"),
        ("num_rows", 4000, "3000"),
        ("noise", 0.2, "0.1"),
        ("power", 2.0, "1.0"),
    ]:
        with pytest.raises(DataError, match=f"data.build.{field} = {value}: .* was built with {was}; choose another"):
            check_recipe({**data, "build": {**data["build"], field: value}}, {}, {})
    with pytest.raises(DataError, match="holds a cache of another kind"):
        check_recipe({**data, "build": FROM_LM}, *groups[1:])
    with pytest.raises(DataError, match="holds a cache of another kind"):
        check_recipe({**groups[0], "build": SYNTHETIC}, {}, {})


@pytest.mark.parametrize(
    "pattern", ["model.layers.*.mlp", "model.layers.*", "*", "model.layers.[12].*:in", "lm_head:out", "model.*.1"]
)
def test_globs_mean_the_same_to_the_model_and_to_its_cache(lm: LanguageModel, pattern: str) -> None:
    known = expand_sites(lm, ["*", "*.*", "*.*.*", "*.*.*.*", "*.*.*:in", "*.*.*.*:in"])
    assert set(sites_of_cache([pattern], known, "here")) == set(expand_sites(lm, [pattern]))


def test_a_streamed_dataset_is_read_no_further_than_max_tokens(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*_: Any) -> Iterator[lm_text.Document]:
        for number in range(100_000):
            assert number < 1000
            yield lm_text.Document(f"d{number}", " ".join("abcdefgh"[number // 8**i % 8] for i in range(9)))

    monkeypatch.setattr(lm_text, "_hf_dataset", endless)
    data = {**groups[0], "path": str(tmp_path / "c"), "build": {**FROM_LM, "max_tokens": 300}}
    cache = build_cache(data, groups[1], {"source": "hf_dataset", "name": "x/y"}, console=QUIET)
    assert cache is not None
    assert cache.manifest.plan.source["num_documents"] == 30


SITES = "data.sites=[model.layers.*.mlp,'model.layers.2:in']"


@pytest.mark.slow  # three processes that load a language model
def test_two_writers_one_killed_then_a_run(tiny_folder: Path, tmp_path: Path, compose_cfg, warm: Warm) -> None:
    for number in range(30):
        words = " ".join("abcdefgh"[(number + i * i) % 8] for i in range(5 + number))
        (tmp_path / f"{number}.txt").write_text(words)
    common = (
        "data=lm",
        SITES,
        "data.build.context_length=16",
        "data.build.chunk_rows=16",
        "data.build.shard_rows=64",
        "data.build.val_fraction=0.2",
        "data.build.dtype=float32",
        "lm=hf",
        f"lm.id={tiny_folder}",
        "lm.dtype=float32",
        "text=files",
        f"text.paths=[{tmp_path}/*.txt]",
    )

    def write(rank: int, **environment: str) -> subprocess.CompletedProcess[str]:
        own = (f"data.path={tmp_path}/shared", f"rank={rank}", "world=2")
        return warm.script(["scripts/cache_activations.py", *common, *own], **environment)

    killed = write(1, SPARSEPILOT_FAULT="cache-shard-write:2")
    assert killed.returncode == -9, killed.stderr
    assert "the cache is sealed when the others are" in write(0).stdout
    with pytest.raises(DataError, match="unfinished, .* shards are missing; start its writer again"):
        train(compose_cfg("data=cache", f"data.path={tmp_path}/shared", "data.sites=[a]", f"run_dir={tmp_path}/no"))
    done = write(1)
    assert "training and" in done.stdout, done.stderr

    plain = check_cache(compose_cfg(*common, f"data.path={tmp_path}/alone", config="cache"))
    alone = build_cache(plain["data"], plain["lm"], plain["text"], console=Console(quiet=True))
    shared = Cache(tmp_path / "shared")
    assert alone is not None
    assert shared.fingerprint == alone.fingerprint
    assert set(shared.widths) == {f"model.layers.{i}.mlp" for i in range(4)} | {"model.layers.2:in"}

    summary = train(
        compose_cfg(
            "data=cache",
            f"data.path={tmp_path}/shared",
            "data.sites=[model.layers.1.mlp,model.layers.3.mlp]",
            "data.num_streams=8",
            "model.d_sae=32",
            "model.k=4",
            "batch=64",
            "samples=1280",
            "logger=none",
            "report=false",
            f"run_dir={tmp_path}/run",
        )
    )
    assert summary["samples"] == 1280
    assert summary["metrics"]["val/l0"] <= 4
    saved = sparsepilot.load(tmp_path / "run")
    assert saved.W_enc.shape == (64, 32)
    assert saved.cfg["sites"] == ["model.layers.1.mlp", "model.layers.3.mlp"]
