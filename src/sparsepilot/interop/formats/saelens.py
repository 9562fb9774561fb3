"""SAELens: cfg.json and sae_weights.safetensors, W_enc [d_in, d_sae], as version 6 writes them and as older ones did.

Checked against the sources of sae-lens 6.54. Its SAE subtracts b_dec from the input where `apply_b_dec_to_input`; its
transcoders never do. A scale of the input (`normalize_activations`) is not in the file, so ours is folded in and none
is named; one of theirs that is named cannot be known, and is refused. BatchTopK becomes JumpReLU with its threshold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.files import read_json, read_safetensors, write_safetensors
from sparsepilot.interop.fold import reading_less, rescaled
from sparsepilot.interop.formats.refuse import (
    Holds,
    Names,
    Written,
    check_held,
    check_thresholds,
    places_of,
    sites_of,
)
from sparsepilot.interop.names import model_of
from sparsepilot.run_folder import write_json

CONFIG, TENSORS = "cfg.json", "sae_weights.safetensors"
KEYS_OF = "6.54.12"
"""The version whose keys are written; without it the tool takes a configuration for one of before 6.0."""
HOLDS: Holds = {
    "autoencoder": ("topk", "batchtopk", "relu", "jumprelu", "gated"),
    "transcoder": ("relu", "jumprelu", "batchtopk"),
    "skip_transcoder": ("relu", "jumprelu", "batchtopk"),
}
REASONS = {
    "crosscoder": "a dictionary has one hook there",
    "cross_layer_transcoder": "a transcoder has one hook in and one out there; circuit_tracer holds these",
    "topk": "its transcoders are ReLU or JumpReLU; sparsify holds TopK ones",
    "gated": "its transcoders are ReLU or JumpReLU",
}
_NAMES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "gated": "gated"}
_READ: dict[str, tuple[str, str, bool]] = {
    "standard": ("relu", "autoencoder", False),
    "topk": ("topk", "autoencoder", False),
    "jumprelu": ("jumprelu", "autoencoder", False),
    "gated": ("gated", "autoencoder", False),
    "transcoder": ("relu", "transcoder", False),
    "skip_transcoder": ("relu", "transcoder", True),
    "jumprelu_transcoder": ("jumprelu", "transcoder", False),
    "jumprelu_skip_transcoder": ("jumprelu", "transcoder", True),
}
"""architecture -> ours, blocks, skip"""
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_FOLDED_OR_NOT_THERE = (None, False, "none")
_METADATA = ("model_name", "hook_name", "hook_name_out", "context_size", "dataset_path", "prepend_bos")


def files(names: set[str], file: str | None) -> list[str]:
    """The files to read in a folder that is of this format; empty for another one."""
    return [CONFIG, TENSORS] if {CONFIG, TENSORS} <= names else []


def write(sae: Dictionary, folder: Path, names: Names) -> Written:
    """Writes both files.

    Raises:
        ConfigError: when the format cannot hold the dictionary, or the tool has no name for its site.
    """
    check_held("saelens", HOLDS, REASONS, sae)
    check_thresholds("saelens", sae)
    cfg, tensors = sae.cfg, sae.tensors()
    same = cfg["blocks"] == "autoencoder"
    architecture = _NAMES[cfg["architecture"]]
    if not same:
        architecture = ("jumprelu_" if architecture == "jumprelu" else "") + ("skip_" if cfg.get("skip") else "")
        architecture += "transcoder"
    if architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    sizes = {"d_in": cfg["d_in"], "d_sae": cfg["d_sae"]} | ({} if same else {"d_out": cfg["d_out"]})
    if architecture == "topk":
        sizes |= {"k": cfg["k"], "rescale_acts_by_decoder_norm": False}
    write_safetensors(folder / TENSORS, tensors)
    write_json(
        folder / CONFIG,
        {
            "architecture": architecture,
            **sizes,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": same,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": _metadata(cfg, names, same),
        },
    )
    how = 'from sae_lens import SAE\nsae = SAE.load_from_disk("{folder}")'
    return Written("", how, ("its activations are the model's own: load the model without processing",))


def _metadata(cfg: dict[str, Any], names: Names, same: bool) -> dict[str, Any]:
    model, source = model_of(cfg), cfg.get("source")
    source = source if isinstance(source, dict) else {}
    known: dict[str, Any] = {
        "sae_lens_version": KEYS_OF,
        "model_name": model,
        "model_class_name": "HookedTransformer",
        "hook_head_index": None,
        "context_size": source.get("context_length"),
        "prepend_bos": True,
        "dataset_path": (source.get("text") or {}).get("source") if isinstance(source.get("text"), dict) else None,
        "seqpos_slice": [None],
    }
    fields = ["hook_name"] if same else ["hook_name", "hook_name_out"]
    given = [names.hook, names.hook_out]
    for field, option, own, place, site in zip(
        fields, ("hook", "hook_out"), given, places_of(cfg), sites_of(cfg), strict=False
    ):
        if own is not None:
            known[field] = own
        elif place is not None:
            known[field] = f"blocks.{place.layer}.{place.hook}"
        else:
            raise ConfigError(
                f"format = saelens: the site {site!r} has no TransformerLens hook that we know of; name it: "
                f"{option}=blocks.<layer>.hook_..."
            )
    return known


def read(folder: Path, file: str | None) -> Dictionary:
    """Reads both files.

    Raises:
        CheckpointError: when one is damaged, or means something that the other file's numbers cannot say.
    """
    path = folder / CONFIG
    cfg = {_OLD_NAMES.get(name, name): value for name, value in read_json(path).items()}
    tensors = read_safetensors(folder / TENSORS)
    architecture = _architecture(cfg, path)
    ours, blocks, skip = _READ[architecture]
    _check_normalisation(cfg, tensors, path)
    if "b_gate" in tensors:
        tensors["b_enc"] = tensors.pop("b_gate")
    sizes = {name: cfg.get(name) for name in ("d_in", "d_sae")}
    if sizes["d_sae"] is None and "b_enc" in tensors:  # versions before 3 gave the expansion factor only
        sizes["d_sae"] = len(tensors["b_enc"])
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else cfg
    assert metadata is not None
    found = {
        "architecture": ours,
        "blocks": blocks,
        "skip": skip,
        "layers": 1,
        **sizes,
        "d_out": cfg.get("d_out", cfg.get("d_in")) if blocks == "transcoder" else cfg.get("d_in"),
        "sites": _sites(metadata.get("hook_name")),
        "sites_out": _sites(metadata.get("hook_name_out" if blocks == "transcoder" else "hook_name")),
        "source": {"model_id": metadata.get("model_name"), "context_length": metadata.get("context_size")},
        "imported": {"format": "saelens", **{name: metadata[name] for name in _METADATA if name in metadata}},
    }
    if ours == "topk":
        found["k"] = cfg.get("k", _activation_k(cfg))
    if ours == "jumprelu" and "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].clamp_min(0)  # a ReLU comes before their jump
    sae = build(found, tensors, path)
    changed = sae.tensors()
    if blocks == "autoencoder" and cfg.get("apply_b_dec_to_input", True) is False:
        changed = reading_less(changed, changed["b_dec"])
    if ours == "topk" and cfg.get("rescale_acts_by_decoder_norm", False) is True:
        changed = rescaled(changed, changed["W_dec"].double().norm(dim=1).clamp_min(1e-30))
    return Dictionary(found, changed)


def _architecture(cfg: dict[str, Any], path: Path) -> str:
    architecture = cfg.get("architecture", "standard")
    activation = cfg.get("activation_fn", "relu")
    if architecture == "standard" and activation == "topk":
        return "topk"
    if not isinstance(architecture, str) or architecture not in _READ:
        raise CheckpointError(f"{path}: architecture {architecture!r} is not known; known: {', '.join(_READ)}")
    if activation not in ("relu", "topk"):
        raise CheckpointError(f"{path}: activation_fn {activation!r} is not known; known: relu, topk")
    return architecture


def _activation_k(cfg: dict[str, Any]) -> Any:
    options = cfg.get("activation_fn_kwargs")
    return options.get("k") if isinstance(options, dict) else None


def _check_normalisation(cfg: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Refuses what happens around the weights and is not in them."""
    kind = cfg.get("normalize_activations")
    if kind not in _FOLDED_OR_NOT_THERE:
        why = "each row is normalised by itself, so codes alone do not give a reconstruction"
        if kind in (True, "expected_average_only_in"):
            why = "the factor is not in the file; fold it in (fold_activation_norm_scaling_factor) and save again"
        raise CheckpointError(f"{path}: normalize_activations is {kind!r}; {why}")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = tensors.pop(name, None)
        if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
            raise CheckpointError(f"{path}: {name} is not 1; a dictionary tuned by one cannot be loaded")


def _sites(hook: Any) -> list[str] | None:
    return [hook] if isinstance(hook, str) else None
