"""EleutherAI's sparsify: <hookpoint>/cfg.json and sae.safetensors, TopK only, encoder.weight [num_latents, d_in].

Checked against the sources of eai-sparsify 1.3. b_dec is subtracted from the input unless `transcode`; input and output
have one width. It knows no scale of the input; ours is folded in.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.files import read_json, read_safetensors, write_safetensors
from sparsepilot.interop.formats.refuse import Holds, Names, Written, check_held, positive, sites_of
from sparsepilot.run_folder import write_json

CONFIG, TENSORS = "cfg.json", "sae.safetensors"
HOLDS: Holds = {
    "autoencoder": ("topk",),
    "transcoder": ("topk",),
    "skip_transcoder": ("topk",),
    "skip_autoencoder": ("topk",),
}
_OTHERS = "it has no activation but TopK"
REASONS = {
    **dict.fromkeys(("relu", "jumprelu", "gated"), _OTHERS),
    "batchtopk": f"{_OTHERS}: k of each row, where this dictionary's rows have k on average",
    "crosscoder": "it reads the output of one module",
    "cross_layer_transcoder": "it reads and writes one module; circuit_tracer holds these",
}
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}


def files(names: set[str], file: str | None) -> list[str]:
    """The files to read in a folder that is of this format; empty for another one."""
    return [CONFIG, TENSORS] if {CONFIG, TENSORS} <= names else []


def write(sae: Dictionary, folder: Path, names: Names) -> Written:
    """Writes both files into a folder that is called as the tool calls the module.

    Raises:
        ConfigError: when the format cannot hold the dictionary, or the tool has no name for its site.
    """
    check_held("sparsify", HOLDS, REASONS, sae)
    cfg, tensors = sae.cfg, sae.tensors()
    if cfg["d_in"] != cfg["d_out"]:
        raise ConfigError(
            f"format = sparsify: cannot hold a transcoder from {cfg['d_in']} to {cfg['d_out']} columns; one width only"
        )
    hookpoint = names.hook or _hookpoint(sae)
    if not re.fullmatch(r"\w[\w.-]*", hookpoint):  # it becomes a folder's name, and may come from a stranger's file
        raise ConfigError(f"format = sparsify: {hookpoint!r} is no name of a module; name it: hook=<module>")
    inside = folder / hookpoint
    inside.mkdir()
    norms_F = tensors["W_dec"].norm(dim=1)
    tensors["W_enc"] = tensors["W_enc"].T
    write_safetensors(inside / TENSORS, {_NAMES.get(name, name): tensor for name, tensor in tensors.items()})
    write_json(
        inside / CONFIG,
        {
            "activation": "topk",
            "expansion_factor": max(1, cfg["d_sae"] // cfg["d_in"]),
            "normalize_decoder": bool(torch.allclose(norms_F, torch.ones(()), atol=1e-4)),
            "num_latents": cfg["d_sae"],
            "k": cfg["k"],
            "multi_topk": False,
            "skip_connection": bool(cfg.get("skip")),
            "transcode": cfg["blocks"] == "transcoder",
            "d_in": cfg["d_in"],
        },
    )
    return Written(hookpoint, 'from sparsify import SparseCoder\nsae = SparseCoder.load_from_disk("{folder}")')


def _hookpoint(sae: Dictionary) -> str:
    """The module's name below the base model, e.g. layers.9.mlp; an autoencoder reads outputs, a transcoder its input
    and its output."""
    read, write = sites_of(sae.cfg)
    module = read.removesuffix(":in")
    named = (
        read == write == module if sae.cfg["blocks"] == "autoencoder" else read == f"{module}:in" and write == module
    )
    if not module or not named:
        raise ConfigError(
            f"format = sparsify: from {read!r} to {write!r} is not the output of one module, nor from its input to its "
            "output, which is what it can name; name it: hook=<module>"
        )
    parts = module.rpartition("/")[2].split(".")
    return ".".join(parts[1:] if len(parts) > 1 else parts)


def read(folder: Path, file: str | None) -> Dictionary:
    """Reads both files.

    Raises:
        CheckpointError: when one is damaged, or the activation is not TopK.
    """
    path = folder / CONFIG
    cfg, tensors = read_json(path), read_safetensors(folder / TENSORS)
    activation = cfg.get("activation", "topk")
    if activation != "topk" or cfg.get("signed"):
        found = "signed" if cfg.get("signed") else activation
        raise CheckpointError(f"{path}: activation {found!r} is not known; known: topk")
    ours = {theirs: name for name, theirs in _NAMES.items()}
    tensors = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    d_in = positive(cfg, "d_in", path)
    num_latents = cfg.get("num_latents") or d_in * positive(cfg, "expansion_factor", path)
    module = [folder.name]
    transcode = bool(cfg.get("transcode"))
    return build(
        {
            "architecture": "topk",
            "blocks": "transcoder" if transcode else "autoencoder",
            "skip": bool(cfg.get("skip_connection")),
            "layers": 1,
            "d_in": d_in,
            "d_sae": num_latents,
            "d_out": d_in,
            "k": cfg.get("k"),
            "sites": [f"{folder.name}:in"] if transcode else module,
            "sites_out": module,
            "imported": {"format": "sparsify"},
        },
        tensors,
        path,
    )
