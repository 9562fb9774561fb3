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

FORMAT = 1
TENSORS = "sae.safetensors"
CONFIG = "sae.json"


class Dictionary(nn.Module):
    """A trained autoencoder for raw activations: everything that training scaled is folded into the biases.

    Attributes:
        W_enc: [d_in, d_sae]
        b_enc: [d_sae]
        W_dec: [d_sae, d_in], unit rows
        b_dec: [d_in]
        cfg: architecture, d_in, d_sae, k, sites (side by side in x), and what it was trained on.
    """

    def __init__(self, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_enc = nn.Parameter(tensors["W_enc"])
        self.b_enc = nn.Parameter(tensors["b_enc"])
        self.W_dec = nn.Parameter(tensors["W_dec"])
        self.b_dec = nn.Parameter(tensors["b_dec"])

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] raw activations -> [..., d_sae] codes, zero where a latent is not active."""
        pre = (x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc
        values, ids = torch.topk(pre, self.cfg["k"], dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, ids, values.relu())

    def decode(self, codes: Tensor) -> Tensor:
        """[..., d_sae] codes -> [..., d_in] raw activations."""
        return codes @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x."""
        return self.decode(self.encode(x))


def save(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor], scale: float) -> None:
    """Writes a dictionary that was trained on inputs multiplied by `scale`, folded for raw ones, all or nothing.

    With x' = s x: pre'/s = (x - b_dec/s) W_enc + b_enc/s and x_hat = (pre'/s)_active W_dec + b_dec/s, so dividing both
    biases by s is all of it, and decoder rows stay unit vectors.
    """
    folded = {name: (t / scale if name in ("b_enc", "b_dec") else t).float().cpu() for name, t in tensors.items()}
    with replacing_path(folder / TENSORS) as temporary:
        save_file({name: t.contiguous() for name, t in folded.items()}, temporary)
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
    if not isinstance(cfg, dict) or cfg.get("format") != FORMAT:
        found = cfg.get("format") if isinstance(cfg, dict) else cfg
        raise CheckpointError(f"{folder / CONFIG}: format {found!r} is not known; this version reads format {FORMAT}")
    if cfg.get("architecture") != "topk":
        raise CheckpointError(f"{folder / CONFIG}: architecture {cfg.get('architecture')!r} is not known; known: topk")
    d_in, d_sae = cfg.get("d_in"), cfg.get("d_sae")
    shapes = {"W_enc": [d_in, d_sae], "b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    for name, shape in shapes.items():
        found = list(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise CheckpointError(f"{folder / TENSORS}: {name} has shape {found}, {CONFIG} says {shape}")
    return Dictionary(cfg, tensors)
