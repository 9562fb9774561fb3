"""A trained dictionary as a plain module, and its file format: safetensors and JSON, nothing that can run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsepilot.errors import CheckpointError
from sparsepilot.run_folder import replacing_path, write_json

FORMAT = 2
TENSORS = "sae.safetensors"
CONFIG = "sae.json"
OWN_TENSORS: dict[str, tuple[str, ...]] = {
    "topk": (),
    "batchtopk": ("threshold",),
    "relu": (),
    "jumprelu": ("threshold",),
    "gated": ("r_mag", "b_mag"),
}
"""What each architecture has beside W_enc, b_enc, W_dec, b_dec; all of shape [d_sae]."""


class Dictionary(nn.Module):
    """A trained autoencoder, crosscoder or transcoder for raw activations.

    Attributes:
        W_enc: [d_in, d_sae]; of a cross-layer transcoder [d_in of one layer, d_sae]
        b_enc: [d_sae]
        W_dec: [d_sae, d_out], unit rows (TopK over several sites: of mean norm 1)
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
        self._subtracts_b_dec = cfg["blocks"] in ("autoencoder", "crosscoder")

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


def save(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a dictionary for raw activations (`interop.fold`), all or nothing."""
    with replacing_path(folder / TENSORS) as temporary:
        save_file(tensors, temporary)
    write_json(folder / CONFIG, {"format": FORMAT, **cfg})


def load(path: str | Path) -> Dictionary:
    """Loads a dictionary from a run folder or a folder with sae.json and sae.safetensors.

    Raises:
        CheckpointError: when a file is missing, damaged, of an unknown format or has tensors of the wrong shape.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: give a run folder whose training has ended")
    try:
        cfg = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: the saved autoencoder is damaged ({error})") from error
    if not isinstance(cfg, dict) or cfg.get("format") not in (1, FORMAT):
        found = cfg.get("format") if isinstance(cfg, dict) else cfg
        raise CheckpointError(f"{folder / CONFIG}: format {found!r} is not known; this version reads 1 and {FORMAT}")
    if cfg["format"] == 1:  # TopK autoencoders only
        cfg = {**cfg, "blocks": "autoencoder", "d_out": cfg.get("d_in"), "sites_out": cfg.get("sites")}
    architecture = cfg.get("architecture")
    if architecture not in OWN_TENSORS:
        raise CheckpointError(
            f"{folder / CONFIG}: architecture {architecture!r} is not known; known: {', '.join(OWN_TENSORS)}"
        )
    shapes = _shapes(cfg)
    for name, shape in shapes.items():
        found = list(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise CheckpointError(f"{folder / TENSORS}: {name} has shape {found}, {CONFIG} says {shape}")
    for name in tensors.keys() - shapes.keys():
        raise CheckpointError(f"{folder / TENSORS}: holds {name}, which a {architecture} {cfg['blocks']} has not")
    return Dictionary(cfg, tensors)


def _shapes(cfg: dict[str, Any]) -> dict[str, list[int | None]]:
    """What every tensor of a file must look like."""
    d_in, d_sae, d_out = cfg.get("d_in"), cfg.get("d_sae"), cfg.get("d_out")
    width = d_in // cfg.get("layers", 1) if isinstance(d_in, int) else d_in
    shapes = {"W_enc": [width, d_sae], "b_enc": [d_sae], "W_dec": [d_sae, d_out], "b_dec": [d_out]}
    shapes |= {name: [d_sae] for name in OWN_TENSORS[cfg["architecture"]]}
    if cfg.get("skip"):
        shapes["W_skip"] = [d_out, d_in]
    return shapes
