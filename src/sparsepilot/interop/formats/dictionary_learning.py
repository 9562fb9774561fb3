"""dictionary_learning: config.json and ae.pt, a pickled state dict that is read with `weights_only=True` alone.

Checked against the sources of dictionary-learning 0.1.0, whose classes differ in names, orientation and in whether
b_dec is subtracted: all do but JumpReluAutoEncoder and AutoEncoderNew. BatchTopK has one threshold for all latents.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepilot.errors import CheckpointError
from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.files import read_json, read_state_dict
from sparsepilot.interop.fold import reading_less, rescaled
from sparsepilot.interop.formats.refuse import Holds, Names, Written, check_held, check_thresholds, sites_of
from sparsepilot.interop.names import layer_of, model_of
from sparsepilot.run_folder import write_json

CONFIG, TENSORS = "config.json", "ae.pt"
HOLDS: Holds = {"autoencoder": ("topk", "batchtopk", "relu", "jumprelu", "gated")}
_ONE_SITE = "all its classes read and write one site"
REASONS = dict.fromkeys(("transcoder", "skip_transcoder", "crosscoder", "cross_layer_transcoder"), _ONE_SITE)

_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("relu", {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": ("relu", {**_LINEAR, "b_dec": "decoder.bias"}),
    "AutoEncoderTopK": ("topk", _LINEAR),
    "BatchTopKSAE": ("batchtopk", {**_LINEAR, "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("batchtopk", {**_PLAIN, "threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", {**_PLAIN, "threshold": "threshold"}),
    "GatedAutoEncoder": (
        "gated",
        {**_LINEAR, "b_enc": "gate_bias", "b_dec": "decoder_bias", "r_mag": "r_mag", "b_mag": "mag_bias"},
    ),
}
"""dict_class -> our architecture, and their name for each of our tensors; names of linear layers are transposed."""
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}
_READS_X = ("JumpReluAutoEncoder", "AutoEncoderNew")
_EXTRA = ("k", "threshold", "group_sizes")
SAME_THRESHOLD = 1e-5
"""Thresholds of a BatchTopK that differ by less, relatively, are one: folding rounds each by itself."""


def files(names: set[str], file: str | None) -> list[str]:
    """The files to read in a folder that is of this format; empty for another one."""
    return [CONFIG, TENSORS] if {CONFIG, TENSORS} <= names else []


def write(sae: Dictionary, folder: Path, names: Names) -> Written:
    """Writes both files.

    Raises:
        ConfigError: when the format cannot hold the dictionary.
    """
    check_held("dictionary_learning", HOLDS, REASONS, sae)
    check_thresholds("dictionary_learning", sae)
    cfg, tensors = sae.cfg, sae.tensors()
    dict_class, extra, notes = _class_of(cfg, tensors)
    if "threshold" in extra and "threshold" in tensors:  # one number: each latent's codes give or take a rounding
        tensors = rescaled(tensors, extra["threshold"].double() / tensors.pop("threshold").double())
    if dict_class in _READS_X:
        tensors = reading_less(tensors, -tensors["b_dec"])
    state = {}
    for ours, theirs in _CLASSES[dict_class][1].items():
        if theirs not in extra:
            state[theirs] = (tensors[ours].T if theirs.endswith(".weight") else tensors[ours]).contiguous()
    torch.save(state | extra, folder / TENSORS)
    site = names.hook or sites_of(cfg)[0]
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[dict_class],
        "dict_class": dict_class,
        "activation_dim": cfg["d_in"],
        "dict_size": cfg["d_sae"],
        "layer": layer_of(site),
        "lm_name": model_of(cfg),
        "submodule_name": site or None,  # a label: their loader does not look at it
    }
    if "k" in extra:
        trainer["k"] = int(extra["k"])
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"d_submodule": cfg["d_in"], "io": "out"}})
    how = 'from dictionary_learning.utils import load_dictionary\nsae, config = load_dictionary("{folder}", "cpu")'
    return Written("", how, notes)


def _class_of(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Their class, and what it keeps beside weights and biases."""
    architecture = cfg["architecture"]
    if architecture == "topk":
        extra = {"k": torch.tensor(cfg["k"], dtype=torch.int), "threshold": torch.tensor(-1.0)}
        return "AutoEncoderTopK", extra, ()
    if architecture == "batchtopk":
        threshold_F = tensors["threshold"]
        low, high = float(threshold_F.min()), float(threshold_F.max())
        if low == high == 0 or low <= 0 or high - low > SAME_THRESHOLD * high:
            return "JumpReluAutoEncoder", {}, ("its BatchTopK has one threshold above 0; written as its JumpReLU",)
        k = max(1, round(float(cfg.get("k") or 1)))
        extra = {"k": torch.tensor(k, dtype=torch.int), "threshold": threshold_F.double().mean().float()}
        ends = _group_ends(cfg)
        if ends is None:
            return "BatchTopKSAE", extra, ()
        sizes = [end - start for start, end in pairwise((0, *ends))]
        return "MatryoshkaBatchTopKSAE", {**extra, "group_sizes": torch.tensor(sizes)}, ()
    return {"relu": "AutoEncoder", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}[architecture], {}, ()


def _group_ends(cfg: dict[str, Any]) -> list[int] | None:
    """Ends of a Matryoshka dictionary's prefixes, where the file says them and they can be."""
    ends = cfg.get("prefix_ends")
    if not isinstance(ends, list) or not all(type(end) is int for end in ends):
        return None
    return ends if len(ends) > 1 and ends[0] > 0 and sorted(set(ends)) == ends and ends[-1] == cfg["d_sae"] else None


def read(folder: Path, file: str | None) -> Dictionary:
    """Reads both files.

    Raises:
        CheckpointError: when one is damaged, or of a class that we do not know.
    """
    path = folder / CONFIG
    trainer = read_json(path).get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in list(_CLASSES):
        found = trainer.get("dict_class") if isinstance(trainer, dict) else trainer
        raise CheckpointError(f"{path}: trainer.dict_class {found!r} is not known; known: {', '.join(_CLASSES)}")
    dict_class = str(trainer["dict_class"])
    architecture, theirs = _CLASSES[dict_class]
    state = read_state_dict(folder / TENSORS)
    extra = {name: state.pop(name) for name in _EXTRA if name in state and state[name].ndim <= (name == "group_sizes")}
    ours = {name: key for key, name in theirs.items()}
    tensors = {ours.get(name, name): t.T if name.endswith(".weight") else t for name, t in state.items()}
    d_in, d_sae = tensors["W_enc"].shape if "W_enc" in tensors and tensors["W_enc"].ndim == 2 else (None, None)
    if architecture == "batchtopk" and "threshold" in extra and "b_enc" in tensors:
        # below 0 until training has set it: all positive ones are active then
        tensors["threshold"] = extra["threshold"].float().clamp_min(0).expand(len(tensors["b_enc"]))
    if architecture == "jumprelu" and "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].clamp_min(0)
    site = trainer.get("submodule_name")
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "blocks": "autoencoder",
        "skip": False,
        "layers": 1,
        "d_in": trainer.get("activation_dim", d_in),
        "d_sae": trainer.get("dict_size", d_sae),
        "d_out": trainer.get("activation_dim", d_in),
        "sites": [site] if isinstance(site, str) else None,
        "sites_out": [site] if isinstance(site, str) else None,
        "source": {"model_id": trainer.get("lm_name")},
        "imported": {"format": "dictionary_learning", "dict_class": dict_class, "layer": trainer.get("layer")},
    }
    if architecture in ("topk", "batchtopk"):
        cfg["k"] = int(extra["k"]) if "k" in extra else trainer.get("k")
    if "group_sizes" in extra:
        cfg["prefix_ends"] = list(accumulate(extra["group_sizes"].tolist()))
    sae = build(cfg, tensors, path)
    changed = sae.tensors()
    if dict_class in _READS_X:
        changed = reading_less(changed, changed["b_dec"])
    if dict_class == "AutoEncoder":  # their loader takes decoder rows to norm 1
        changed = rescaled(changed, changed["W_dec"].double().norm(dim=1).clamp_min(1e-30))
    return Dictionary(cfg, changed)
