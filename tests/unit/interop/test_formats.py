"""Other tools' formats: what each can hold comes back the same, the rest is refused, and no damaged file loads.

That their code agrees with ours is shown in tests/peers.
"""

from __future__ import annotations

import json
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import ARCHITECTURES, assert_same, make
from torch import Tensor

import sparsepilot
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.interop import hub
from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.export import export
from sparsepilot.interop.fold import fold
from sparsepilot.interop.formats import FORMATS, WRITABLE
from sparsepilot.interop.formats.refuse import Names, kind_of
from sparsepilot.interop.load import _files

ROOT = Path(__file__).parents[3]
BLOCKS = {
    "autoencoder": Blocks.autoencoder(12),
    "crosscoder": Blocks.autoencoder(6, 6),
    "transcoder": Blocks((12,), (12,), same=False),
    "skip_transcoder": Blocks((12,), (12,), same=False, skip=True),
    "cross_layer_transcoder": Blocks((6, 6), (6, 6), same=False, cross_layer=True),
}
KINDS = {name.partition("-")[0]: name for name in reversed(ARCHITECTURES)}.values()
"""One name of each architecture."""


def folded(architecture: str, kind: str) -> Dictionary:
    """A dictionary as the end of a run leaves it."""
    model = make(architecture, BLOCKS[kind])
    if architecture == "batchtopk":
        model.threshold.fill_(0.9)  # type: ignore[operator]
    cfg = model.inference_config(model.knob.initial)
    layers = range(len(model.blocks.read_widths))
    cfg["sites"] = [f"model.layers.{i}" + ("" if model.blocks.same else ".mlp:in") for i in layers]
    cfg["sites_out"] = [f"model.layers.{i}" + ("" if model.blocks.same else ".mlp") for i in layers]
    scale_in_D, scale_out_D = (
        torch.full((model.d_in,), 0.1),
        torch.full((model.d_out,), 0.1 if model.blocks.same else 2),
    )
    return build(cfg, fold(cfg, model.inference_tensors(), scale_in_D, scale_out_D), Path("sae.json"))


@pytest.mark.parametrize("format", WRITABLE)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("architecture", KINDS)
@torch.no_grad()
def test_what_a_format_holds_comes_back_and_the_rest_is_refused(
    tmp_path: Path, format: str, kind: str, architecture: str
) -> None:
    sae = folded(architecture, kind)
    out = tmp_path / "out"
    if sae.cfg["architecture"] not in FORMATS[format].holds.get(kind, ()):
        with pytest.raises(ConfigError, match=rf"^format = {format}: cannot hold .*{kind.replace('_', ' ')}s; ."):
            export([sae], format, out)
        assert not list(tmp_path.iterdir())
        return
    written = export([sae], format, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    back = sparsepilot.load(out / written.folder)
    assert kind_of(back.cfg) == kind
    x_BD = 10 * torch.randn(40, sae.cfg["d_in"], generator=torch.Generator().manual_seed(0))
    codes_BF = sae.encode(x_BD)
    assert (codes_BF != 0).any()
    assert_same(back.encode(x_BD), codes_BF, "codes")
    assert_same(back.decode(codes_BF), sae.decode(codes_BF), "decoded")
    assert_same(back(x_BD), sae(x_BD), "reconstruction")


def test_every_architecture_is_in_the_table_of_docs_formats() -> None:
    """Each row of the table is what `holds` says."""
    text = (ROOT / "docs" / "formats.md").read_text()
    text = text.partition("## What each can hold")[2].partition("\n## ")[0]
    for format in WRITABLE:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{format}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        holds = FORMATS[format].holds
        for kind, cell in zip(BLOCKS, cells, strict=True):
            said = [] if cell == "-" else [word.strip("` ") for word in cell.split(",")]
            assert sorted(said) == sorted(holds.get(kind, ())), (format, kind)


@pytest.mark.parametrize(
    ("format", "kind", "changes", "message"),
    [
        ("saelens", "autoencoder", {"sites": ["lm_head"]}, r"the site 'lm_head' has no TransformerLens hook"),
        ("saelens", "autoencoder", {"sites": ["a", "b"]}, r"cannot hold a dictionary of 2 sites \(sites\)"),
        ("sparsify", "autoencoder", {"sites": ["model.layers.0:in"], "sites_out": None}, r"name it: hook="),
        ("sparsify", "autoencoder", {"sites": ["...."], "sites_out": None}, r"is no name of a module; name it"),
        ("sparsify", "transcoder", {"sites": ["model.layers.0"]}, r"not the output of one module"),
        ("circuit_tracer", "transcoder", {"sites": ["synthetic"]}, r"name them: hook=blocks"),
        ("circuit_tracer", "transcoder", {"sites": ["model.layers.1.mlp:in"]}, r"are not two hooks of one layer"),
        ("circuit_tracer", "cross_layer_transcoder", {"sites": ["a", "b"]}, r"are not one hook of ascending layers"),
        ("circuit_tracer", "cross_layer_transcoder", {"widths_out": [5, 7]}, r"layers of one width"),
        ("nothing", "autoencoder", {}, r"there is no such format to write; known: saelens"),
        ("gemma_scope", "autoencoder", {}, r"there is no such format to write"),
    ],
)
def test_what_a_tool_cannot_name_is_refused(
    tmp_path: Path, format: str, kind: str, changes: dict[str, Any], message: str
) -> None:
    architecture = "topk" if format == "sparsify" else "jumprelu-step"
    sae = folded(architecture, kind)
    sae.cfg |= changes
    with pytest.raises(ConfigError, match=message):
        export([sae], format, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["transcoder", "cross_layer_transcoder"])
@pytest.mark.parametrize("names", [Names("foo"), Names(None, "blocks.0.hook"), Names("")])
def test_a_name_that_says_no_place_is_not_dropped(tmp_path: Path, kind: str, names: Names) -> None:
    with pytest.raises(ConfigError, match=r"is no hook of a layer; give one|are not one hook of ascending layers"):
        export([folded("jumprelu-step", kind)], "circuit_tracer", tmp_path / "out", names)
    assert not list(tmp_path.iterdir())


def test_a_label_that_nobody_reads_may_say_anything(tmp_path: Path) -> None:
    sae = folded("topk", "autoencoder")
    for sites, label in ((["lm_head"], "lm_head"), (None, None)):
        sae.cfg |= {"sites": sites, "sites_out": sites}
        export([sae], "dictionary_learning", tmp_path / str(label))
        assert json.loads((tmp_path / str(label) / "config.json").read_text())["trainer"]["submodule_name"] == label
        assert sparsepilot.load(tmp_path / str(label)).cfg["sites"] == sites


def test_the_user_may_name_the_places(tmp_path: Path) -> None:
    sae = folded("jumprelu-step", "transcoder")
    sae.cfg |= {"sites": ["a"], "sites_out": ["b"]}
    names = Names("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    export([sae], "circuit_tracer", tmp_path / "ct", names)
    assert (tmp_path / "ct" / "layer_3.safetensors").is_file()
    export([sae], "saelens", tmp_path / "sl", names)
    assert sparsepilot.load(tmp_path / "sl").cfg["sites_out"] == ["blocks.3.hook_mlp_out"]
    assert sparsepilot.load(tmp_path / "ct").cfg["sites"] == ["blocks.3.mlp.hook_in"]


def test_thresholds_below_0_and_a_latent_that_writes_backwards_are_refused(tmp_path: Path) -> None:
    sae = folded("jumprelu-step", "autoencoder")
    clt = folded("jumprelu-step", "cross_layer_transcoder")
    with torch.no_grad():
        sae.threshold[0] = -0.1
        clt.W_dec[-1, 0] = 0.1
    for format in ("saelens", "dictionary_learning"):
        with pytest.raises(ConfigError, match="thresholds below 0"):
            export([sae], format, tmp_path / "out")
    with pytest.raises(ConfigError, match="write earlier layers, too"):
        export([clt], "circuit_tracer", tmp_path / "out")


def test_a_batchtopk_of_uneven_thresholds_becomes_their_jumprelu(tmp_path: Path) -> None:
    sae = folded("batchtopk", "autoencoder")
    with torch.no_grad():
        sae.threshold[0] *= 2
    written = export([sae], "dictionary_learning", tmp_path / "out")
    assert "written as its JumpReLU" in written.notes[0]
    x_BD = 10 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    assert_same(sparsepilot.load(tmp_path / "out").encode(x_BD).detach(), sae.encode(x_BD).detach(), "codes")


def test_a_set_wants_one_transcoder_per_layer(tmp_path: Path) -> None:
    saes = [folded("relu-l1", "transcoder") for _ in range(2)]
    with pytest.raises(ConfigError, match=r"need a layer each.* of layers \[0, 0\]"):
        export(saes, "circuit_tracer", tmp_path / "out")
    with pytest.raises(ConfigError, match="2 runs were given; saelens takes one"):
        export(saes, "saelens", tmp_path / "out")
    saes[1].cfg |= {"sites": ["model.layers.4.mlp:in"], "sites_out": ["model.layers.4.mlp"]}
    written = export(saes, "circuit_tracer", tmp_path / "out")
    assert "these are 0, 4" in written.notes[0]
    with pytest.raises(CheckpointError, match=r"a set of 2 transcoders; name one of them, e\.g\. layer_0\.safetensors"):
        sparsepilot.load(tmp_path / "out")
    assert sparsepilot.load(tmp_path / "out" / "layer_4.safetensors").cfg["sites"] == ["blocks.4.mlp.hook_in"]


def test_an_export_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = folded("topk", "autoencoder")
    out = tmp_path / "out"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "cfg.json")

    with monkeypatch.context() as patch:
        patch.setattr("sparsepilot.interop.formats.saelens.write_json", full)
        with pytest.raises(OSError, match="No space"):
            export([sae], "saelens", out)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.tmp").mkdir()  # one that was killed
    (tmp_path / ".out.tmp" / "half").write_text("x")
    export([sae], "saelens", out)
    assert sorted(path.name for path in out.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    with pytest.raises(ConfigError, match=r"^out = .*out: is there already and not empty"):
        export([sae], "saelens", out)


# ------------------------------------------------------------------------------------------------ files of strangers


def exported(tmp_path: Path, format: str) -> Path:
    kind = "transcoder" if format == "circuit_tracer" else "autoencoder"
    sae = folded("topk" if format == "sparsify" else "jumprelu-step", kind)
    return tmp_path / "out" / export([sae], format, tmp_path / "out").folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        sparsepilot.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("format", WRITABLE)
def test_damaged_weights_are_one_clear_error(tmp_path: Path, format: str) -> None:
    folder = exported(tmp_path, format)
    (weights,) = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt")]
    good = weights.read_bytes()
    for length in (0, 7, len(good) // 2, len(good) - 3):
        weights.write_bytes(good[:length])
        refused(folder, "is damaged")
    if weights.suffix == ".pt":
        weights.write_bytes(good)
        tensors = torch.load(weights)
        tensors["W_enc"] = tensors["W_enc"][:, :-1]
        torch.save(tensors, weights)
    else:
        weights.write_bytes(good)
        tensors = load_file(weights)
        name = "encoder.weight" if format == "sparsify" else "W_enc"
        dim = 0 if format in ("sparsify", "circuit_tracer") else 1
        save_file({**tensors, name: tensors[name].narrow(dim, 0, 95).contiguous()}, weights)
    refused(folder, r"W_enc has shape \[12, 95\], .* says \[12, 96\]")
    weights.unlink()
    refused(
        tmp_path / "out" if format == "sparsify" else folder, r"holds .*; a run folder .* or a dictionary of one of"
    )


def test_nan_integers_missing_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, "saelens")
    good = load_file(folder / "sae_weights.safetensors")
    b_dec = good["b_dec"].clone()
    b_dec[3] = float("nan")
    for change, message in [
        ({"b_dec": b_dec}, "b_dec holds NaN"),
        ({"b_dec": b_dec.nan_to_num(float("inf"))}, "b_dec holds infinity"),
        ({"b_enc": torch.zeros(96, dtype=torch.int64)}, "b_enc holds int64, not numbers"),
        ({"threshold": None}, r"threshold has shape None, cfg.json says \[96\]"),
        ({"W_gate": torch.zeros(3)}, "holds W_gate, which jumprelu autoencoders do not have"),
        ({"scaling_factor": torch.full((96,), 2.0)}, "scaling_factor is not 1"),
    ]:
        tensors = {name: t for name, t in {**good, **change}.items() if t is not None}
        save_file(tensors, folder / "sae_weights.safetensors")
        refused(folder, message)
    threshold = good["threshold"].clone()
    threshold[3] = float("inf")  # a latent that somebody has switched off
    save_file({**good, "threshold": threshold}, folder / "sae_weights.safetensors")
    assert not sparsepilot.load(folder).encode(torch.randn(64, good["b_dec"].shape[0]))[:, 3].any()


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("saelens", {"architecture": "temporal"}, "architecture 'temporal' is not known; known: standard, topk"),
        ("saelens", {"architecture": ["topk"]}, "architecture \\['topk'\\] is not known"),
        ("saelens", {"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' is not known"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "the factor is not in the file"),
        ("saelens", {"normalize_activations": True}, "the factor is not in the file"),
        ("saelens", {"normalize_activations": "layer_norm"}, "each row is normalised by itself"),
        ("saelens", {"d_in": "12"}, "d_in is '12', a positive integer is needed"),
        ("saelens", {"d_sae": 0}, "d_sae is 0, a positive integer is needed"),
        ("saelens", {"architecture": "topk", "k": 97}, "k is 97, an integer from 1 to d_sae = 96 is needed"),
        ("saelens", {"architecture": "topk", "k": 3.5}, "k is 3.5"),
        ("sparsify", {"activation": "groupmax"}, "activation 'groupmax' is not known; known: topk"),
        ("sparsify", {"signed": True}, "activation 'signed' is not known"),
        ("sparsify", {"d_in": None}, "d_in is None"),
        ("sparsify", {"k": None}, "k is None"),
        (
            "sparsify",
            {"num_latents": 0, "expansion_factor": 2},
            r"W_enc has shape \[12, 96\], cfg.json says \[12, 24\]",
        ),
        ("dictionary_learning", {"trainer": {"dict_class": "CrossCoder"}}, "dict_class 'CrossCoder' is not known"),
        ("dictionary_learning", {"trainer": None}, "dict_class None is not known"),
        (
            "dictionary_learning",
            {"trainer": {"dict_class": "GatedAutoEncoder"}},
            r"r_mag has shape None, config.json says \[96\]",
        ),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(
    tmp_path: Path, format: str, change: dict[str, Any], message: str
) -> None:
    folder = exported(tmp_path, format)
    (config,) = folder.glob("*.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 200_000, '{"architecture": "topk"\xff}'])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = exported(tmp_path, "saelens")
    (folder / "cfg.json").write_bytes(text.encode("latin-1"))
    refused(folder, "is damaged|an object with fields is needed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "decoder"}, "blocks 'decoder' is not known"),
        ({"k": None}, "k is None"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 3}, "layers is 3, which blocks 'autoencoder'"),
        ({"d_out": 5}, "d_out is 5, d_in 12"),
        ({"sites": "model.layers.9"}, "sites is 'model.layers.9', a list of names is needed"),
    ],
)
def test_our_own_configuration_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sae = folded("topk", "autoencoder")
    save_file(sae.tensors(), tmp_path / "sae.safetensors")
    (tmp_path / "sae.json").write_text(json.dumps({"format": 2, **sae.cfg, **change}))
    refused(tmp_path, message)


class RunsCode:
    """What a hostile pickle holds."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path(self.marker),))


def test_no_pickle_runs(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    folder = exported(tmp_path, "dictionary_learning")
    torch.save({"W_enc": RunsCode(str(marker))}, folder / "ae.pt")
    refused(folder, "a pickle of more than tensors, which could run code and is never opened")
    (folder / "ae.pt").write_bytes(pickle.dumps(RunsCode(str(marker))))
    refused(folder, "is never opened")
    torch.save([torch.zeros(3)], folder / "ae.pt")
    refused(folder, "holds list, a state dict of tensors is needed")
    for name in ("sae_weights.safetensors", "params.npz"):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / "cfg.json").write_text("{}")
        (other / name).write_bytes(pickle.dumps(RunsCode(str(marker))))
        refused(other, "is damaged|is no npz file of plain numbers")
    np.savez(tmp_path / "params" / "params.npz", W_enc=np.array([RunsCode(str(marker))], dtype=object))
    refused(tmp_path / "params", "is no npz file of plain numbers")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.pkl").write_bytes(pickle.dumps(RunsCode(str(marker))))
    refused(alone, "holds model.pkl; a run folder")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("dictionary_learning", {1: torch.zeros(2)}, "1 is no plain tensor under a name"),
        ("dictionary_learning", {"k": torch.tensor(float("nan"))}, "could have written .*NaN"),
        ("dictionary_learning", {"group_sizes": torch.tensor(96)}, "is no dictionary that dictionary_learning could"),
        ("dictionary_learning", {"b_dec": torch.zeros(12, device="meta")}, "'b_dec' is no plain tensor"),
        ("dictionary_learning", {"b_dec": torch.zeros(12).to_sparse()}, "'b_dec' is no plain tensor|is damaged"),
        ("saelens", {"b_enc": torch.zeros(())}, "is no dictionary that saelens could have written"),
    ],
)
def test_odd_tensors_of_a_stranger_are_one_clear_error(
    tmp_path: Path, format: str, change: dict[Any, Tensor], message: str
) -> None:
    sae = folded("batchtopk", "autoencoder")
    folder = tmp_path / "out"
    export([sae], format, folder)
    if format == "saelens":
        config = json.loads((folder / "cfg.json").read_text())
        del config["d_sae"]
        (folder / "cfg.json").write_text(json.dumps(config))
        save_file(load_file(folder / "sae_weights.safetensors") | change, folder / "sae_weights.safetensors")
    else:
        torch.save(torch.load(folder / "ae.pt") | change, folder / "ae.pt")
    refused(folder, message)


def test_a_file_that_is_named_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(tmp_path, "saelens")
    (folder / "other.pkl").write_bytes(b"anything")
    assert sparsepilot.load(folder / "cfg.json").cfg == sparsepilot.load(folder).cfg
    with pytest.raises(CheckpointError, match=r"other.pkl: is no file of a dictionary"):
        sparsepilot.load(folder / "other.pkl")
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(folder.parent))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"holds other.pkl; no dictionary of a known format"):
        sparsepilot.load(f"hf:me/saes/{folder.name}/other.pkl")


def test_gemma_scope_of_wrong_shapes_or_cut_is_refused(tmp_path: Path) -> None:
    arrays = {"W_enc": np.ones((4, 6)), "b_enc": np.ones(6), "W_dec": np.ones((6, 4)), "b_dec": np.ones(4)}
    np.savez(tmp_path / "params.npz", **arrays)
    refused(tmp_path, "threshold has shape None")
    np.savez(tmp_path / "params.npz", **{**arrays, "threshold": np.ones(5)})
    refused(tmp_path, r"threshold has shape \[5\], params.npz says \[6\]")
    np.savez(tmp_path / "params.npz", **{**arrays, "threshold": np.ones(6)})
    assert sparsepilot.load(tmp_path).cfg["blocks"] == "autoencoder"
    np.savez(tmp_path / "params.npz", **{**arrays, "threshold": np.ones(6, dtype=np.complex64)})
    refused(tmp_path, "is no dictionary that gemma_scope could have written")
    np.savez(tmp_path / "params.npz", **{**arrays, "threshold": np.ones(6)})
    whole = (tmp_path / "params.npz").read_bytes()
    (tmp_path / "params.npz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "is no npz file of plain numbers")
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        sparsepilot.load(tmp_path / "elsewhere")


def test_a_cross_layer_set_with_a_layer_missing_or_mis_shaped_is_refused(tmp_path: Path) -> None:
    export([folded("jumprelu-step", "cross_layer_transcoder")], "circuit_tracer", tmp_path / "out")
    folder = tmp_path / "out"
    decoder = load_file(folder / "W_dec_1.safetensors")
    save_file({"W_dec_1": decoder["W_dec_1"][:, :, :-1].contiguous()}, folder / "W_dec_1.safetensors")
    refused(folder, r"W_dec_1 has shape \[48, 1, 5\], \[48, 1, 6\] is needed")
    (folder / "W_dec_1.safetensors").unlink()
    refused(folder, "W_dec_1.safetensors: is damaged")
    encoder = load_file(folder / "W_enc_1.safetensors")
    save_file({**encoder, "b_enc_1": encoder["b_enc_1"][:-1].contiguous()}, folder / "W_enc_1.safetensors")
    save_file(decoder, folder / "W_dec_1.safetensors")
    refused(folder, r"b_enc_<i> of 2 layers have shapes \[\(47,\), \(48,\)\]")


# ------------------------------------------------------------------------------------------------ hubs and scripts


class FakeHub:
    """A repository in a folder; remembers what was downloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.downloaded = folder, []

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        if (repo, revision) not in (("me/saes", None), ("me/saes", "v2")):
            raise OSError("no such repository")
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def hf_hub_download(self, repo: str, filename: str, revision: str | None = None) -> str:
        self.downloaded.append(filename)
        return str(self.folder / filename)


def test_from_a_hub_come_the_files_that_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = folded("jumprelu-step", "autoencoder")
    export([sae], "saelens", tmp_path / "repo" / "layer_3" / "saelens")
    export([folded("topk", "autoencoder")], "saelens", tmp_path / "repo" / "layer_4")
    (tmp_path / "repo" / "layer_3" / "saelens" / "sparsity.safetensors").write_text("not needed")
    arrays = {name: tensor.numpy() for name, tensor in sae.tensors().items()}
    (tmp_path / "repo" / "width_16k").mkdir()
    np.savez(tmp_path / "repo" / "width_16k" / "params.npz", **arrays)
    fake = FakeHub(tmp_path / "repo")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)  # type: ignore[arg-type]
    loaded = sparsepilot.load("hf:me/saes/layer_3/saelens")
    assert torch.equal(loaded.W_enc, sae.W_enc)
    assert sorted(fake.downloaded) == ["layer_3/saelens/cfg.json", "layer_3/saelens/sae_weights.safetensors"]
    fake.downloaded.clear()
    sparsepilot.load("hf:me/saes@v2/width_16k/params.npz")
    assert fake.downloaded == ["width_16k/params.npz"]
    for reference, message in [
        ("hf:saes", "is no hub id"),
        ("hf:me/saes/../x", "is no hub id"),
        ("hf:me/saes", "holds nothing; no dictionary of a known format"),
        ("hf:me/other/layer_3", "hf:me/other/layer_3: no such repository"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            sparsepilot.load(reference)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs huggingface_hub"):
        hub.fetch("hf:me/saes", _files)


def test_without_a_network_the_hubs_own_copy_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real huggingface_hub, on a cache laid out as it does."""
    constants = pytest.importorskip("huggingface_hub.constants")
    sae = folded("jumprelu-step", "autoencoder")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--me--saes"
    export([sae], "saelens", repo / "snapshots" / commit / "layer_3")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(sparsepilot.load("hf:me/saes/layer_3").W_enc, sae.W_enc)
    with pytest.raises(CheckpointError, match="hf:me/none/layer_3: "):
        sparsepilot.load("hf:me/none/layer_3")


def test_reading_needs_neither_lightning_nor_hydra(tmp_path: Path) -> None:
    folders = [str(exported(tmp_path / format, format)) for format in WRITABLE]
    code = (
        "import sys, sparsepilot; [sparsepilot.load(folder) for folder in sys.argv[1:]]; "
        "bad = {'lightning', 'hydra', 'zarr', 'wandb', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, *folders], check=True)


def script(name: str, *words: str) -> None:
    argv, sys.argv = sys.argv, [name, *words]
    try:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    finally:
        sys.argv = argv


def test_a_run_is_exported_and_published(train_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny("model=jumprelu")
    run, hook = f"run_dir={tmp_path}/run", "hook=blocks.3.hook_resid_post"
    script("export.py", run, "format=saelens", f"out={tmp_path}/saelens", hook)
    assert f'SAE.load_from_disk("{tmp_path}/saelens")' in capsys.readouterr().out
    x_BD = torch.randn(20, 16)
    mine = sparsepilot.load(tmp_path / "run")
    assert_same(sparsepilot.load(tmp_path / "saelens")(x_BD).detach(), mine(x_BD).detach(), "exported")
    script("publish.py", run, f"out={tmp_path}/public", "formats=[dictionary_learning]", "hub=me/mine", "license=mit")
    public = tmp_path / "public"
    assert torch.equal(sparsepilot.load(public).W_enc, mine.W_enc)
    assert (public / "dictionary_learning" / "ae.pt").is_file()
    card = (public / "README.md").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"| FVU, about the mean of the data | {summary['metrics']['val/fvu']:.4g} |" in card
    assert 'sparsepilot.load("hf:me/mine")' in card
    assert 'license: "mit"' in card
    assert "saelens can hold it, too" in card
    assert str(tmp_path) not in card + (public / "sae.json").read_text()
    with pytest.raises(SystemExit) as stopped:
        script("export.py", run, "format=sparsify", f"out={tmp_path}/no")
    assert stopped.value.code == 2
    assert "error: format = sparsify: cannot hold jumprelu autoencoders; it has no activation but TopK" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        script("publish.py", run, f"out={tmp_path}/no", "formats=[saelens]")
    assert not (tmp_path / "no").exists()
    for layer in range(2):
        sae = folded("relu-l1", "transcoder")
        places = Names(f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
        export([sae], "circuit_tracer", tmp_path / f"layer{layer}", places)
    files = ",".join(f"{tmp_path}/layer{layer}/layer_{layer}.safetensors" for layer in range(2))
    script("export.py", f"run_dir=[{files}]", "format=circuit_tracer", f"out={tmp_path}/set")
    assert sorted(path.name for path in (tmp_path / "set").glob("layer_*")) == [
        f"layer_{layer}.safetensors" for layer in range(2)
    ]


def test_folders_with_odd_names_and_places_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    export([folded("topk", "autoencoder")], "saelens", Path("007"))
    script("export.py", "run_dir=007", "format=saelens", "out=1e3")
    script("publish.py", "run_dir=1e3", "out=-5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-5", "007", "1e3"]
    file = tmp_path / "007" / "cfg.json"
    for words, message in [
        (["export.py", "run_dir=8", "format=saelens", "out=x"], "8: there is no such file or folder"),
        (["export.py", "run_dir=007", "format=3", "out=x"], "format = 3: there is no such format"),
        (["export.py", "run_dir=007", "format=saelens", "out=[a,b]"], "should be one name"),
        (["export.py", "run_dir=007", "format=saelens", f"out={file}/sub"], f"out = {file}: no folder can be made"),
        (["export.py", "run_dir=007", "format=saelens", f"out={file}/a/b"], f"out = {file}/a: no folder can be made"),
        (["export.py", "run_dir=007", "format=saelens", "out=/proc/x/y"], "out = /proc/x: no folder can be made"),
        (["publish.py", "run_dir=[a,b]", "out=x"], "should be one name"),
        (["publish.py", "run_dir=007", "out=/proc/x"], "out = /proc/.x.tmp: no folder can be made"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            script(*words)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_folder_of_the_language_model_stays_private(tmp_path: Path) -> None:
    from sparsepilot.reporting.publishing import publish

    sae = folded("topk", "autoencoder")
    sae.cfg["source"] = {
        "model_id": str(tmp_path / "my-model"),
        "context_length": 8,
        "text": {"source": "files", "paths": [str(tmp_path)]},
        "recipe": {"lm.gguf": str(tmp_path)},
    }
    save_file(sae.tensors(), tmp_path / "sae.safetensors")
    (tmp_path / "sae.json").write_text(json.dumps({"format": 2, **sae.cfg}))
    publish(str(tmp_path), tmp_path / "public", ["saelens"])
    for path in (tmp_path / "public").rglob("*"):
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text()
    assert sparsepilot.load(tmp_path / "public").cfg["source"]["model_id"] == "my-model"


def test_bf16_weights_load_as_fp32(tmp_path: Path) -> None:
    folder = exported(tmp_path, "saelens")
    path = folder / "sae_weights.safetensors"
    half: dict[str, Tensor] = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(half, path)
    loaded = sparsepilot.load(folder)
    assert loaded.W_enc.dtype == torch.float32
    assert torch.equal(loaded.W_dec.detach(), half["W_dec"].float())
