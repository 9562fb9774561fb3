"""From the dictionary that training holds to one for raw activations: everything that training scaled is folded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PER_ROW = {"topk"}
"""Architectures that compare latents with each other: their codes may be scaled by one number only."""
BLOCK_NUMBERS = 2**20
"""of a matrix that are in fp64 at a time"""


def fold(cfg: dict[str, Any], tensors: dict[str, Tensor], scale_in_D: Tensor, scale_out_D: Tensor) -> dict[str, Tensor]:
    """Tensors of `Autoencoder.inference_tensors` ([d_sae, width]) for raw inputs and targets.

    With x' = s_in x and y' = s_out y (per column), a = codes' n_i in place of codes', where n_i > 0 is the norm of
    decoder row i after its columns were divided by s_out:

        W_enc_i <- n_i s_in W_enc_i    b_enc_i <- n_i b_enc_i    threshold_i <- n_i threshold_i
        W_dec_i <- W_dec_i / (s_out n_i), a unit row              b_dec <- b_dec / s_out

    With `codes_factor`, a scalar c that all codes have at inference: c n_i in place of n_i for W_enc, b_enc and
    threshold, and the same W_dec.
    TopK takes one n for all latents, since a latent's place among the others must not change. A transcoder's b_in goes
    into b_enc and b_mag (and the skip's share of it into b_dec); an autoencoder's is its b_dec.

    Returns W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_out], b_dec and, where there is such a thing, threshold, r_mag,
    b_mag ([d_sae]), W_skip [d_out, d_in]; a cross-layer transcoder's W_enc is [d_in of one layer, d_sae].
    """
    s_in, s_out = scale_in_D.double(), scale_out_D.double()
    d_sae, width = tensors["W_enc"].shape
    readers = s_in.numel() // width
    # in fp64 a block of latents at a time: a second dictionary in fp64 might not fit where one in fp32 does
    size = max(1, BLOCK_NUMBERS // max(width, s_out.numel()))
    blocks = [slice(start, min(start + size, d_sae)) for start in range(0, d_sae, size)]
    norms_F = torch.cat([(tensors["W_dec"][block].double() / s_out).norm(dim=1) for block in blocks]).clamp_min(1e-30)
    if cfg["architecture"] in PER_ROW:
        norms_F = norms_F.mean().expand_as(norms_F)
    codes_by_F = norms_F * tensors["codes_factor"].double() if "codes_factor" in tensors else norms_F
    b_in_D = None
    if cfg["blocks"] in ("transcoder", "cross_layer_transcoder"):
        b_in_D = tensors["b_in"].double() / s_in
    per_latent_names = ("W_enc", "b_enc", "W_dec", "threshold", "r_mag", "b_mag")
    own = {name: tensors[name] for name in per_latent_names if name in tensors}
    scales_FD = per_latent(s_in, readers, d_sae)
    shifts_FD = None if b_in_D is None else per_latent(b_in_D, readers, d_sae)
    folded = {
        name: torch.empty((width, d_sae) if name == "W_enc" else tuple(tensor.shape)) for name, tensor in own.items()
    }
    for block in blocks:
        part = _fold_block(
            {name: tensor[block].double() for name, tensor in own.items()},
            norms_F[block], codes_by_F[block], scales_FD[block], s_out, None if shifts_FD is None else shifts_FD[block],
        )  # fmt: skip
        folded["W_enc"][:, block] = part.pop("W_enc").T
        for name, values in part.items():
            folded[name][block] = values
    b_dec_D = tensors["b_dec"].double() / s_out
    if "W_skip" in tensors:
        W_skip = tensors["W_skip"].double() * s_in / s_out[:, None]
        folded["W_skip"] = W_skip.float().cpu()
        if b_in_D is not None:
            b_dec_D = b_dec_D - W_skip @ b_in_D
    return folded | {"b_dec": b_dec_D.float().cpu()}


def _fold_block(
    tensors: dict[str, Tensor],
    norms_F: Tensor,
    codes_by_F: Tensor,
    scales_FD: Tensor,
    s_out: Tensor,
    shifts_FD: Tensor | None,
) -> dict[str, Tensor]:
    """The formulas of `fold` for some of the latents, in fp64, codes times `codes_by`; W_enc as [F, width]."""
    folded = {
        "W_enc": codes_by_F[:, None] * scales_FD * tensors["W_enc"],
        "b_enc": codes_by_F * tensors["b_enc"],
        "W_dec": tensors["W_dec"] / s_out / norms_F[:, None],
    }
    folded |= {name: codes_by_F * tensors[name] for name in ("threshold", "b_mag") if name in tensors}
    if "r_mag" in tensors:
        folded["r_mag"] = tensors["r_mag"]
    if shifts_FD is not None:
        shift_F = (folded["W_enc"] * shifts_FD).sum(dim=1)
        folded["b_enc"] = folded["b_enc"] - shift_F
        if "b_mag" in folded:
            folded["b_mag"] = folded["b_mag"] - folded["r_mag"].exp() * shift_F
    return folded


def unfold(
    cfg: dict[str, Any], tensors: dict[str, Tensor], scale_in_D: Tensor, scale_out_D: Tensor, mean_in_D: Tensor
) -> dict[str, Tensor]:
    """The inverse of `fold`: tensors for training in scaled units, of a dictionary for raw activations.

    With x' = s_in x, y' = s_out y, and n_i the norm of decoder row i after its columns were multiplied by s_out:

        W_dec_i <- s_out W_dec_i / n_i, a unit row               b_dec <- s_out b_dec
        W_enc_i <- n_i W_enc_i / s_in    b_enc_i <- n_i b_enc_i    threshold_i <- n_i threshold_i

    A transcoder in training reads x' - mean_in: W_enc mean_in goes back into b_enc and b_mag, and W_skip mean_in into
    b_dec. Every n_i is its own, for TopK, too; where they differ, a latent's place among the others does change.

    Args:
        cfg: of the dictionary.
        tensors: as `Dictionary.tensors` gives them, W_enc [d_in, d_sae].
        scale_in_D, scale_out_D: [d_in], [d_out] factors of the run to come.
        mean_in_D: [d_in] what a transcoder subtracts from its scaled input.

    Returns:
        Tensors of `Autoencoder.inference_tensors` without b_in ([d_sae, width]), and `norms` [d_sae].
    """
    given = {name: tensor.double().cpu() for name, tensor in tensors.items()}
    s_in, s_out, mean_in = (tensor.double().cpu() for tensor in (scale_in_D, scale_out_D, mean_in_D))
    W_enc_FD = given["W_enc"].T
    d_sae, width = W_enc_FD.shape
    readers = s_in.numel() // width
    W_dec_FD = given["W_dec"] * s_out
    norms_F = W_dec_FD.norm(dim=1).clamp_min(1e-30)
    found = {
        "W_enc": norms_F[:, None] * W_enc_FD / per_latent(s_in, readers, d_sae),
        "b_enc": norms_F * given["b_enc"],
        "W_dec": W_dec_FD / norms_F[:, None],
        "b_dec": s_out * given["b_dec"],
        "norms": norms_F,
    }
    found |= {name: norms_F * given[name] for name in ("threshold", "b_mag") if name in given}
    if "r_mag" in given:
        found["r_mag"] = given["r_mag"]
    if "W_skip" in given:
        found["W_skip"] = s_out[:, None] * given["W_skip"] / s_in
    if cfg["blocks"] in ("transcoder", "cross_layer_transcoder"):
        shift_F = (found["W_enc"] * per_latent(mean_in, readers, d_sae)).sum(dim=1)
        found["b_enc"] = found["b_enc"] + shift_F
        if "b_mag" in found:
            found["b_mag"] = found["b_mag"] + found["r_mag"].exp() * shift_F
        if "W_skip" in found:
            found["b_dec"] = found["b_dec"] + found["W_skip"] @ mean_in
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def per_latent(values_D: Tensor, readers: int, d_sae: int) -> Tensor:
    """[d_sae, width of a latent's input]: of values per input column, those that each latent reads."""
    width = values_D.numel() // readers
    return values_D.view(readers, 1, width).expand(readers, d_sae // readers, width).reshape(d_sae, width)


def reading_less(tensors: dict[str, Tensor], by_D: Tensor) -> dict[str, Tensor]:
    """The same codes from an encoder that reads x - by where it read x: W_enc by [d_sae] goes into b_enc and b_mag.

    Formats differ in whether b_dec is subtracted from the input; with by = -b_dec an encoder of ours no longer does.
    """
    shift_F = by_D.double() @ tensors["W_enc"].double()
    moved = dict(tensors)
    moved["b_enc"] = (tensors["b_enc"].double() + shift_F).float()
    if "b_mag" in tensors:
        moved["b_mag"] = (tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift_F).float()
    return moved


def rescaled(tensors: dict[str, Tensor], by_F: Tensor) -> dict[str, Tensor]:
    """Codes times `by` [d_sae] > 0, decoder rows divided by it: the same reconstruction."""
    n_F = by_F.double()
    changed = {name: tensor.double() for name, tensor in tensors.items()}
    changed["W_enc"] = changed["W_enc"] * n_F
    changed["W_dec"] = changed["W_dec"] / n_F[:, None]
    changed |= {name: changed[name] * n_F for name in ("b_enc", "threshold", "b_mag") if name in changed}
    return {name: tensor.float() for name, tensor in changed.items()}
