"""A trained dictionary as a plain module, and its file format: safetensors and JSON, nothing that can run code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsepilot.errors import CheckpointError
from sparsepilot.interop.files import read_json, read_notes, read_safetensors, write_safetensors
from sparsepilot.run_folder import replacing_path, write_json

FORMAT = 2
TENSORS = "sae.safetensors"
CONFIG = "sae.json"
SAMPLES = "samples"
"""Field of sae.json that the file of tensors notes, too."""
OWN_TENSORS: dict[str, tuple[str, ...]] = {
    "topk": (),
    "batchtopk": ("threshold",),
    "relu": (),
    "jumprelu": ("threshold",),
    "gated": ("r_mag", "b_mag"),
}
"""What each architecture has beside W_enc, b_enc, W_dec, b_dec; all of shape [d_sae]."""
SAME = ("autoencoder", "crosscoder")
"""Blocks whose encoder reads x - b_dec; all others read x."""
BLOCKS = (*SAME, "transcoder", "cross_layer_transcoder")


class Dictionary(nn.Module):
    """A trained autoencoder, crosscoder or transcoder for raw activations.

    Attributes:
        W_enc: [d_in, d_sae]; of a cross-layer transcoder [d_in of one layer, d_sae]
        b_enc: [d_sae]
        W_dec: [d_sae, d_out], unit rows (TopK over several sites: of mean norm 1) where this project trained it
        b_dec: [d_out]
        threshold: [d_sae], of batchtopk and jumprelu
        r_mag, b_mag: [d_sae], of gated
        W_skip: [d_out, d_in], of a transcoder with a skip
        cfg: architecture, blocks, d_in, d_sae, d_out, k, sites and sites_out (side by side in x and in the
            reconstruction), and what it was trained on.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    r_mag: Tensor
    b_mag: Tensor
    W_skip: Tensor

    def __init__(self, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.cfg = cfg
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))
        self._subtracts_b_dec = cfg["blocks"] in SAME

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] raw activations -> [..., d_sae] codes, zero where a latent is not active."""
        x = x.to(self.W_enc.dtype)
        if self._subtracts_b_dec:
            x = x - self.b_dec
        width = self.W_enc.shape[0]
        if x.shape[-1] == width:
            product = x @ self.W_enc
        else:  # each part of the latents reads a layer of its own
            layers = x.view(*x.shape[:-1], -1, width)
            product = torch.einsum("...ld,dlf->...lf", layers, self.W_enc.view(width, layers.shape[-2], -1)).flatten(-2)
        pre = product + self.b_enc
        architecture = self.cfg["architecture"]
        if architecture == "topk":
            values, ids = torch.topk(pre, self.cfg["k"], dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, ids, values.relu())
        if architecture in ("jumprelu", "batchtopk"):
            return pre * (pre > self.threshold)
        if architecture == "gated":
            return (pre > 0) * (self.r_mag.exp() * product + self.b_mag).relu()
        return pre.relu()

    def decode(self, codes: Tensor) -> Tensor:
        """[..., d_sae] codes -> [..., d_out] raw activations; a skip's part, which hangs on x, is in `forward`."""
        return codes @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]: the reconstruction of x, or what a transcoder makes of it."""
        y = self.decode(self.encode(x))
        return y if not hasattr(self, "W_skip") else y + x.to(y.dtype) @ self.W_skip.T

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as `save` takes them."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def save(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a dictionary for raw activations (`interop.fold`): two files, each all or nothing.

    A kill between the two leaves the new tensors beside the old sae.json, where there was one; `load` refuses them by
    the samples that both note.

    Raises:
        CheckpointError: when the disk is full or not writable.
    """
    with replacing_path(folder / TENSORS) as temporary:
        write_safetensors(temporary, tensors, {SAMPLES: str(cfg[SAMPLES])} if SAMPLES in cfg else None)
    write_json(folder / CONFIG, {"format": FORMAT, **cfg})


def load(folder: Path) -> Dictionary:
    """Loads what `save` wrote; `interop.load` also knows other formats.

    Raises:
        CheckpointError: when a file is missing, damaged, of an unknown format or has tensors of the wrong shape, or the
            two are of different states of a run.
    """
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: give a run folder whose training has ended")
    cfg, tensors = read_json(folder / CONFIG), read_safetensors(folder / TENSORS)
    if cfg.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{folder / CONFIG}: format {cfg.get('format')!r} is not known; this version reads 1 and {FORMAT}"
        )
    noted = read_notes(folder / TENSORS).get(SAMPLES)
    if noted is not None and noted != str(cfg.get(SAMPLES)):
        raise CheckpointError(
            f"{folder}: {TENSORS} is of {noted} samples and {CONFIG} of {cfg.get(SAMPLES)}, as after a kill between "
            "the two; the run's line again writes both"
        )
    if cfg["format"] == 1:  # TopK autoencoders only
        cfg = {**cfg, "blocks": "autoencoder", "d_out": cfg.get("d_in"), "sites_out": cfg.get("sites")}
    return build(cfg, tensors, folder / CONFIG)


def build(cfg: dict[str, Any], tensors: dict[str, Tensor], config_path: Path) -> Dictionary:
    """A dictionary in fp32 from a configuration and tensors that nobody has looked at yet.

    Raises:
        CheckpointError: naming the file and the field or tensor that cannot be.
    """
    _check(cfg, config_path)
    folder, says = config_path.parent, config_path.name
    shapes = _shapes(cfg)
    for name, shape in shapes.items():
        found = list(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise CheckpointError(f"{folder}: {name} has shape {found}, {says} says {shape}")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise CheckpointError(f"{folder}: holds {name}, which {cfg['architecture']} {cfg['blocks']}s do not have")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{folder}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not numbers")
        fp32 = tensor.float()
        if name == "threshold":  # a latent that never fires may be switched off by an infinite one
            fp32 = fp32[fp32 != math.inf]
        if not bool(fp32.isfinite().all()):
            raise CheckpointError(f"{folder}: {name} holds {'NaN' if bool(fp32.isnan().any()) else 'infinity'}")
    return Dictionary(cfg, {name: tensor.float().contiguous() for name, tensor in tensors.items()})


def _check(cfg: dict[str, Any], path: Path) -> None:
    """Everything that can be wrong with a configuration by itself."""
    for field, known in (("architecture", tuple(OWN_TENSORS)), ("blocks", BLOCKS)):
        if cfg.get(field) not in known:
            raise CheckpointError(f"{path}: {field} {cfg.get(field)!r} is not known; known: {', '.join(known)}")
    for field in ("d_in", "d_sae", "d_out", "layers"):
        value = cfg.get(field, 1 if field == "layers" else None)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {field} is {value!r}, a positive integer is needed")
    d_in, d_sae, layers = cfg["d_in"], cfg["d_sae"], cfg.get("layers", 1)
    if cfg["blocks"] in SAME and cfg["d_out"] != d_in:
        raise CheckpointError(f"{path}: d_out is {cfg['d_out']}, d_in {d_in}; blocks {cfg['blocks']!r} have one width")
    if layers > 1 and (cfg["blocks"] != "cross_layer_transcoder" or d_in % layers or d_sae % layers):
        raise CheckpointError(
            f"{path}: layers is {layers}, which blocks {cfg['blocks']!r} of {d_in} to {d_sae} cannot have"
        )
    k = cfg.get("k")
    if cfg["architecture"] == "topk" and (type(k) is not int or not 1 <= k <= d_sae):
        raise CheckpointError(f"{path}: k is {k!r}, an integer from 1 to d_sae = {d_sae} is needed")
    for field in ("sites", "sites_out"):
        sites = cfg.get(field)
        if sites is not None and not (isinstance(sites, list) and all(isinstance(site, str) for site in sites)):
            raise CheckpointError(f"{path}: {field} is {sites!r}, a list of names is needed")


def _shapes(cfg: dict[str, Any]) -> dict[str, list[int]]:
    """What every tensor of a file must look like."""
    d_in, d_sae, d_out = cfg["d_in"], cfg["d_sae"], cfg["d_out"]
    shapes = {
        "W_enc": [d_in // cfg.get("layers", 1), d_sae],
        "b_enc": [d_sae],
        "W_dec": [d_sae, d_out],
        "b_dec": [d_out],
    }
    shapes |= {name: [d_sae] for name in OWN_TENSORS[cfg["architecture"]]}
    if cfg.get("skip"):
        shapes["W_skip"] = [d_out, d_in]
    return shapes
