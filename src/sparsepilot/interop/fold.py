"""From the dictionary that training holds to one for raw activations: everything that training scaled is folded in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

PER_ROW = {"topk"}
"""Architectures that compare latents with each other: their codes may be scaled by one number only."""


def fold(cfg: dict[str, Any], tensors: dict[str, Tensor], scale_in_D: Tensor, scale_out_D: Tensor) -> dict[str, Tensor]:
    """Tensors of `Autoencoder.inference_tensors` ([d_sae, width]) for raw inputs and targets.

    With x' = s_in x and y' = s_out y (per column), a = codes' n_i in place of codes', where n_i > 0 is the norm of
    decoder row i after its columns were divided by s_out:

        W_enc_i <- n_i s_in W_enc_i    b_enc_i <- n_i b_enc_i    threshold_i <- n_i threshold_i
        W_dec_i <- W_dec_i / (s_out n_i), a unit row              b_dec <- b_dec / s_out

    TopK takes one n for all latents, since a latent's place among the others must not change. A transcoder's b_in goes
    into b_enc and b_mag (and the skip's share of it into b_dec); an autoencoder's is its b_dec.

    Returns W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_out], b_dec and, where there is such a thing, threshold, r_mag,
    b_mag ([d_sae]), W_skip [d_out, d_in]; a cross-layer transcoder's W_enc is [d_in of one layer, d_sae].
    """
    W_enc_FD, W_dec_FD = tensors["W_enc"].double(), tensors["W_dec"].double()
    s_in, s_out = scale_in_D.double(), scale_out_D.double()
    d_sae, width = W_enc_FD.shape
    readers = s_in.numel() // width
    W_dec_FD = W_dec_FD / s_out
    norms_F = W_dec_FD.norm(dim=1).clamp_min(1e-30)
    if cfg["architecture"] in PER_ROW:
        norms_F = norms_F.mean().expand_as(norms_F)
    n_F1 = norms_F[:, None]
    scales_FD = s_in.view(readers, 1, width).expand(readers, d_sae // readers, width).reshape(d_sae, width)
    folded = {
        "W_enc": n_F1 * scales_FD * W_enc_FD,
        "b_enc": norms_F * tensors["b_enc"].double(),
        "W_dec": W_dec_FD / n_F1,
        "b_dec": tensors["b_dec"].double() / s_out,
    }
    if "threshold" in tensors:
        folded["threshold"] = norms_F * tensors["threshold"].double()
    if "r_mag" in tensors:
        folded |= {"r_mag": tensors["r_mag"].double(), "b_mag": norms_F * tensors["b_mag"].double()}
    if "W_skip" in tensors:
        folded["W_skip"] = tensors["W_skip"].double() * s_in / s_out[:, None]
    if cfg["blocks"] in ("transcoder", "cross_layer_transcoder"):
        b_in_D = tensors["b_in"].double() / s_in
        per_reader = b_in_D.view(readers, 1, width).expand(readers, d_sae // readers, width).reshape(d_sae, width)
        shift_F = (folded["W_enc"] * per_reader).sum(dim=1)
        folded["b_enc"] = folded["b_enc"] - shift_F
        if "b_mag" in folded:
            folded["b_mag"] = folded["b_mag"] - folded["r_mag"].exp() * shift_F
        if "W_skip" in folded:
            folded["b_dec"] = folded["b_dec"] - folded["W_skip"] @ b_in_D
    folded["W_enc"] = folded["W_enc"].T
    return {name: tensor.float().cpu().contiguous() for name, tensor in folded.items()}
