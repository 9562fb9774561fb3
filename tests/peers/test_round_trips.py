"""What we export loads with the other tool's loader and gives our codes and reconstructions, and the way back.

The tools live in an environment of their own (`make peers`, or the Python that SPARSEPILOT_PEERS names); worker.py runs
there, one process per tool.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import assert_same, make
from torch import Tensor

import sparsepilot
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.prefixes import FixedPrefixes
from sparsepilot.interop import dictionary
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.interop.export import export
from sparsepilot.interop.fold import fold

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SPARSEPILOT_PEERS", ROOT / ".venv-peers" / "bin" / "python"))
pytestmark = [
    pytest.mark.slow,  # every tool takes half a minute to import
    pytest.mark.skipif(not PYTHON.exists(), reason=f"the other tools are not installed: no {PYTHON}; make peers"),
]
TOLERANCE = 1e-5
D, F, ROWS = 24, 80, 50

BLOCKS = {
    "autoencoder": Blocks.autoencoder(12),
    "transcoder": Blocks((12,), (12,), same=False),
    "wider transcoder": Blocks((8,), (12,), same=False),
    "skip transcoder": Blocks((12,), (12,), same=False, skip=True),
    "cross-layer": Blocks((6, 6, 6), (6, 6, 6), same=False, cross_layer=True),
}
SITES = {
    "autoencoder": (["model.layers.0"], ["model.layers.0"]),
    "cross-layer": ([f"model.layers.{i}.mlp:in" for i in range(3)], [f"model.layers.{i}.mlp" for i in range(3)]),
}
MLP = (["model.layers.0.mlp:in"], ["model.layers.0.mlp"])

EXPORTS: dict[str, dict[str, tuple[str, ...]]] = {
    "saelens": {
        "autoencoder": ("topk", "batchtopk", "matryoshka", "relu-l1", "jumprelu-step", "jumprelu-tanh", "gated"),
        "transcoder": ("relu-l1", "jumprelu-tanh", "batchtopk"),
        "wider transcoder": ("relu-l1", "jumprelu-step"),
        "skip transcoder": ("relu-l1", "jumprelu-step", "matryoshka"),
    },
    "sparsify": {
        "autoencoder": ("topk",),
        "transcoder": ("topk",),
        "skip transcoder": ("topk",),
    },
    "dictionary_learning": {
        "autoencoder": ("topk", "batchtopk", "matryoshka", "relu-l1", "jumprelu-step", "gated"),
    },
    "circuit_tracer": {
        "transcoder": ("relu-l1", "jumprelu-step", "batchtopk"),
        "skip transcoder": ("relu-l1", "jumprelu-tanh"),
        "cross-layer": ("relu-l1", "jumprelu-step", "batchtopk"),
    },
}
IMPORTS: dict[str, tuple[str, ...]] = {
    "saelens": (
        "standard", "standard:reads_x", "topk", "topk:rescaled", "topk:reads_x", "jumprelu", "jumprelu:reads_x",
        "gated", "gated:reads_x", "batchtopk", "transcoder", "skip_transcoder", "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ),
    "sparsify": ("expansion", "latents", "skip", "transcode", "transcode-skip"),
    "dictionary_learning": (
        "standard", "topk", "batchtopk", "batchtopk-untrained", "matryoshka", "jumprelu", "gated",
    ),
    "circuit_tracer": ("relu", "jump", "relu-skip", "jump-skip", "clt-relu", "clt-jump"),
}  # fmt: skip


class Trained(NamedTuple):
    """A dictionary as the end of a run leaves it, and what it was in training, with scales far from 1."""

    sae: Dictionary
    model: Autoencoder
    scale_in_D: Tensor
    scale_out_D: Tensor

    def in_training(self, x_BD: Tensor) -> Tensor:
        """What training reconstructs of raw rows, in raw units."""
        scaled_BD = x_BD * self.scale_in_D
        targets_BD = scaled_BD.new_zeros(len(x_BD), self.model.d_out)
        return self.model.evaluate(scaled_BD, targets_BD, self.model.knob.initial).y_hat_BD / self.scale_out_D


def trained(folder: Path, architecture: str, blocks: str, seed: int = 0) -> Trained:
    prefixes = FixedPrefixes([0.125, 0.5]) if architecture == "matryoshka" else None
    name = "batchtopk" if architecture == "matryoshka" else architecture
    model = make(name, BLOCKS[blocks], seed, prefixes=prefixes)
    if name == "batchtopk":
        model.threshold.fill_(0.9)  # type: ignore[operator]
    per_site = [torch.full((width,), 0.037 * 3.0**i) for i, width in enumerate(model.blocks.read_widths)]
    scale_in_D = torch.cat(per_site)
    scale_out_D = scale_in_D if model.blocks.same else torch.full((model.d_out,), 2.0)
    sites, sites_out = SITES.get(blocks, MLP)
    cfg = {**model.inference_config(model.knob.initial), "sites": sites, "sites_out": sites_out}
    cfg["source"] = {"model_id": "a/model", "context_length": 64}
    folder.mkdir(parents=True)
    dictionary.save(folder, cfg, fold(cfg, model.inference_tensors(), scale_in_D, scale_out_D))
    return Trained(sparsepilot.load(folder), model, scale_in_D, scale_out_D)


def raw_rows(sae: Dictionary, folder: Path) -> Tensor:
    """Rows that activate a few latents, in the units that `trained` scaled by 0.037."""
    x = torch.randn(ROWS, sae.cfg["d_in"], generator=torch.Generator().manual_seed(1)) / 0.037
    save_file({"x": x}, folder / "x.safetensors")
    return x


def work(tool: str, folder: Path, jobs: list[dict[str, str]]) -> list[dict[str, Tensor]]:
    """The other tool's answers."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHON), str(Path(__file__).with_name("worker.py")), tool, str(folder / "jobs.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(job["answer"]) for job in jobs]


@torch.no_grad()
def compare(name: str, sae: Dictionary, x: Tensor, theirs: dict[str, Tensor], failed: dict[str, str]) -> None:
    codes = sae.encode(x)
    assert 0 < float((codes != 0).float().mean()) < 0.9, name  # a comparison of zeros would say nothing
    mine = {"codes": codes, "decoded": sae.decode(codes), "y": sae(x)}
    for what, value in theirs.items():
        try:
            assert_same(mine[what], value, f"{name}: {what}", TOLERANCE)
        except AssertionError as error:
            failed[f"{name}: {what}"] = str(error)


Jobs = list[dict[str, str]]
Check = Callable[[list[dict[str, Tensor]], dict[str, str]], None]
"""compares a tool's answers to `Jobs` with ours, and says where they differ"""


def of_our_exports(tmp_path: Path, tool: str) -> tuple[Jobs, Check]:
    """What we export the tool loads."""
    jobs, expected = [], {}
    for blocks, architectures in EXPORTS[tool].items():
        for architecture in architectures:
            name = f"{architecture} {blocks}"
            folder = tmp_path / name
            run = trained(folder, architecture, blocks)
            written = export([run.sae], tool, folder / "out")
            at = folder / "out" / written.folder
            expected[name] = (run, raw_rows(run.sae, folder), at)
            jobs.append({"folder": str(at), "x": str(folder / "x.safetensors"), "answer": str(folder / "answer")})

    def check(answers: list[dict[str, Tensor]], failed: dict[str, str]) -> None:
        for (name, (run, x, at)), theirs in zip(expected.items(), answers, strict=True):
            assert_same(theirs["y"], run.in_training(x), f"{name}: training", TOLERANCE)
            compare(name, run.sae, x, theirs, failed)
            compare(f"{name}, read back", sparsepilot.load(at), x, theirs, failed)

    return jobs, check


def of_their_dictionaries(tmp_path: Path, tool: str) -> tuple[Jobs, Check]:
    """What the tool saves we load."""
    x = rows_of_theirs(tmp_path)
    jobs = [
        {"case": case, "folder": str(tmp_path / str(i) / "layers.3"), "x": str(tmp_path / "x.safetensors")}
        for i, case in enumerate(IMPORTS[tool])
    ]
    jobs = [{**job, "answer": f"{job['folder']}.answer"} for job in jobs]
    for job in jobs:
        Path(job["folder"]).parent.mkdir()

    def check(answers: list[dict[str, Tensor]], failed: dict[str, str]) -> None:
        for job, theirs in zip(jobs, answers, strict=True):
            compare(job["case"], sparsepilot.load(job["folder"]), x, theirs, failed)

    return jobs, check


def rows_of_theirs(folder: Path) -> Tensor:
    """Rows for a dictionary of the tool's size."""
    x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(2)) + 0.5
    save_file({"x": x}, folder / "x.safetensors")
    return x


def released(write: Callable[[Path, dict[str, Tensor]], Any], folder: Path, **changes: Any) -> None:
    """A dictionary's tensors in fp32, in a folder laid out as a release."""
    make_ = torch.Generator().manual_seed(7)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    tensors = {name: 0.3 * torch.randn(shape, generator=make_) for name, shape in shapes.items()}
    tensors["threshold"] = tensors["threshold"].abs() if "threshold" not in changes else changes["threshold"]
    folder.mkdir(parents=True)
    write(folder, tensors)


OLD = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small", "hook_point_layer": 8}
OLDER_CONFIGS: dict[str, dict[str, Any]] = {
    "version 2": {**OLD, "hook_point": "blocks.8.hook_resid_pre", "normalize_activations": False, "use_ghost_grads": 1},
    "version 3": {**OLD, "hook_name": "blocks.8.hook_resid_pre", "architecture": "standard",
                  "activation_fn_str": "relu", "apply_b_dec_to_input": False, "normalize_activations": "none",
                  "finetuning_scaling_factor": False, "sae_lens_training_version": "3.2.1", "prepend_bos": True},
    "version 4, topk": {**OLD, "hook_name": "blocks.8.hook_resid_pre", "architecture": "standard",
                        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}, "apply_b_dec_to_input": True,
                        "normalize_activations": "none"},
    "version 5, jumprelu": {**OLD, "hook_name": "blocks.8.hook_resid_pre", "architecture": "jumprelu",
                            "apply_b_dec_to_input": False, "finetuning_scaling_factor": False,
                            "normalize_activations": None},
}  # fmt: skip


def of_older_releases_of_saelens(tmp_path: Path, tool: str) -> tuple[Jobs, Check]:
    x = rows_of_theirs(tmp_path)
    jobs = []
    for name, cfg in OLDER_CONFIGS.items():

        def write(folder: Path, tensors: dict[str, Tensor], cfg: dict[str, Any] = cfg) -> None:
            if cfg.get("architecture") != "jumprelu":
                tensors.pop("threshold")
            if "hook_point" in cfg:
                tensors["scaling_factor"] = torch.ones(F)  # it was saved, and 1, for a while
            save_file(tensors, folder / "sae_weights.safetensors")
            (folder / "cfg.json").write_text(json.dumps(cfg))

        released(write, tmp_path / name)
        jobs.append({"folder": str(tmp_path / name), "x": str(tmp_path / "x.safetensors")})
    jobs = [{**job, "answer": f"{job['folder']}.answer"} for job in jobs]

    def check(answers: list[dict[str, Tensor]], failed: dict[str, str]) -> None:
        for job, theirs in zip(jobs, answers, strict=True):
            compare(job["folder"], sparsepilot.load(job["folder"]), x, theirs, failed)

    return jobs, check


def of_gemma_scope(tmp_path: Path, tool: str) -> tuple[Jobs, Check]:
    """sae-lens reads an SAE, circuit-tracer a transcoder; the arrays are the same."""
    x = rows_of_theirs(tmp_path)
    folder = tmp_path / ("transcoders" if tool == "circuit_tracer" else "saes")
    released(lambda at, tensors: np.savez(at / "params.npz", **{k: t.numpy() for k, t in tensors.items()}), folder)
    at = str(folder / "params.npz" if tool == "circuit_tracer" else folder)

    def check(answers: list[dict[str, Tensor]], failed: dict[str, str]) -> None:
        sae = sparsepilot.load(folder)
        assert sae.cfg["blocks"] == ("transcoder" if tool == "circuit_tracer" else "autoencoder")
        compare(at, sae, x, answers[0], failed)

    return [{"folder": at, "x": str(tmp_path / "x.safetensors"), "answer": f"{folder}.answer"}], check


def of_a_set_of_transcoders(tmp_path: Path, tool: str) -> tuple[Jobs, Check]:
    """circuit-tracer reads three of them as one."""
    saes = []
    for layer in range(3):
        sae = trained(tmp_path / f"run{layer}", "jumprelu-step", "transcoder", seed=layer).sae
        sae.cfg["sites"], sae.cfg["sites_out"] = [f"model.layers.{layer}.mlp:in"], [f"model.layers.{layer}.mlp"]
        saes.append(sae)
    export(saes, "circuit_tracer", tmp_path / "out")
    x = raw_rows(saes[0], tmp_path)

    def check(answers: list[dict[str, Tensor]], failed: dict[str, str]) -> None:
        (theirs,) = answers
        for layer, sae in enumerate(saes):
            compare(f"layer {layer}", sae, x, {what: value[layer] for what, value in theirs.items()}, failed)
            back = sparsepilot.load(tmp_path / "out" / f"layer_{layer}.safetensors")
            compare(
                f"layer {layer}, read back", back, x, {what: value[layer] for what, value in theirs.items()}, failed
            )

    places = {"x": str(tmp_path / "x.safetensors"), "answer": str(tmp_path / "answer")}
    return [{"folder": str(tmp_path / "out"), **places}], check


ALSO = {
    "saelens": (of_older_releases_of_saelens, of_gemma_scope),
    "circuit_tracer": (of_gemma_scope, of_a_set_of_transcoders),
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_both_ways(tmp_path: Path, tool: str) -> None:
    """One process of the tool answers all: it takes longer to import than to compute."""
    makers = [of_our_exports, of_their_dictionaries, *ALSO.get(tool, ())]
    made = []
    for maker in makers:
        folder = tmp_path / maker.__name__
        folder.mkdir()
        made.append(maker(folder, tool))
    answers = iter(work(tool, tmp_path, [job for jobs, _ in made for job in jobs]))
    failed: dict[str, str] = {}
    for jobs, check in made:
        check([next(answers) for _ in jobs], failed)
    assert not failed
