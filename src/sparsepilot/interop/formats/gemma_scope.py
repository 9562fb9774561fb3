"""Gemma Scope: params.npz with W_enc [d_in, d_sae], b_enc, W_dec, b_dec, threshold; JumpReLU, read only.

f = ReLU(pre) where pre = x W_enc + b_enc is above the threshold (Lieberum et al. 2024, arXiv 2408.05147): b_dec is not
subtracted. Transcoders have the same arrays; one is taken for a transcoder where its path says so, or its widths do.
"""

from __future__ import annotations

from pathlib import Path

from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.files import read_npz
from sparsepilot.interop.fold import reading_less

TENSORS = "params.npz"


def files(names: set[str], file: str | None) -> list[str]:
    """The file to read in a folder that is of this format; empty for another one."""
    if file is not None and file.endswith(".npz"):
        return [file]
    return [TENSORS] if TENSORS in names else []


def read(folder: Path, file: str | None) -> Dictionary:
    """Reads the file.

    Raises:
        CheckpointError: when it is damaged or has arrays of the wrong shape.
    """
    path = folder / (file or TENSORS)
    tensors = read_npz(path)
    tensors = {"W" + name[1:] if name.startswith("w_") else name: tensor for name, tensor in tensors.items()}
    sizes = [tensors[name].shape[0] if name in tensors and tensors[name].ndim else None for name in ("b_enc", "b_dec")]
    W_enc = tensors.get("W_enc")
    d_in = W_enc.shape[0] if W_enc is not None and W_enc.ndim else sizes[1]
    transcoder = d_in != sizes[1] or any("transcoder" in part for part in path.absolute().parts)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].clamp_min(0)
    cfg = {
        "architecture": "jumprelu",
        "blocks": "transcoder" if transcoder else "autoencoder",
        "skip": False,
        "layers": 1,
        "d_in": d_in,
        "d_sae": sizes[0],
        "d_out": sizes[1],
        "imported": {"format": "gemma_scope"},
    }
    sae = build(cfg, tensors, path)
    changed = sae.tensors()
    return sae if transcoder else Dictionary(cfg, reading_less(changed, changed["b_dec"]))
