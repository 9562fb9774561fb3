"""The active (row, latent, value) triples of a trained dictionary, never as a [rows, latents] matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepilot.interop.dictionary import SAME, Dictionary
from sparsepilot.ops.product import EncoderProduct, Workspace, has_fast_half
from sparsepilot.ops.select import Pairs, select_above, select_topk


class SparseEncoder:
    """`Dictionary.encode` by the selections of training: tile by tile, and where the machine multiplies bfloat16 in
    hardware by products in it, whose rounding is made good in fp32 (ops/select.py). No code is left out or added but
    where two values are within fp32's own rounding of each other or of a threshold."""

    def __init__(self, sae: Dictionary) -> None:
        self._sae = sae
        self._W_enc_FD = sae.W_enc.detach().T.contiguous()
        self._shift_F = -sae.threshold.detach() if sae.cfg["architecture"] in ("jumprelu", "batchtopk") else None
        self._readers = sae.cfg["d_in"] // sae.W_enc.shape[0]
        self._half = torch.bfloat16 if has_fast_half(sae.W_enc.device) else None
        self._workspace = Workspace()

    @torch.no_grad()
    def __call__(self, x_BD: Tensor) -> Pairs:
        """[B, D] raw activations, fp32 -> the pairs whose code is above zero, with their codes."""
        sae = self._sae
        b_enc_F = sae.b_enc if self._shift_F is None else sae.b_enc + self._shift_F
        product = EncoderProduct(
            x_BD - sae.b_dec if sae.cfg["blocks"] in SAME else x_BD,
            self._W_enc_FD,
            b_enc_F,
            self._workspace,
            half=self._half,
            certain=True,
            readers=self._readers,
        )
        if sae.cfg["architecture"] == "topk":
            top = select_topk(product, sae.cfg["k"])
            rows_BK = torch.arange(len(x_BD)).unsqueeze(1).expand_as(top.ids_BK)
            return _positive(Pairs(rows_BK.reshape(-1), top.ids_BK.reshape(-1), top.values_BK.reshape(-1).float()))
        pairs = select_above(product, 0.0)
        if self._shift_F is not None:
            pairs = pairs._replace(values_P=pairs.values_P - self._shift_F[pairs.ids_P])
        elif sae.cfg["architecture"] == "gated":
            product_P = pairs.values_P - sae.b_enc[pairs.ids_P]
            magnitude_P = sae.r_mag[pairs.ids_P].exp() * product_P + sae.b_mag[pairs.ids_P]
            pairs = pairs._replace(values_P=magnitude_P)
        return _positive(pairs)


def _positive(pairs: Pairs) -> Pairs:
    keep_P = (pairs.values_P > 0).nonzero().squeeze(1)
    return pairs if len(keep_P) == len(pairs.values_P) else Pairs(*(part[keep_P] for part in pairs))
