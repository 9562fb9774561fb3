"""A trained dictionary over many rows: codes as pairs, reconstructions from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sparsepilot.interop.dictionary import Dictionary

_CODES = 2**24
"""Numbers of a dense [rows, latents] matrix that exists at a time: 64 MiB."""
_SPARSE_BELOW = 1 / 24
"""Share of active latents up to which a reconstruction from pairs is the faster one."""


class Coded(NamedTuple):
    """Rows, their active (row, latent, value) triples in the order of the rows, and what is made of them."""

    rows: slice
    rows_P: Tensor
    """counted from the slice's start"""
    ids_P: Tensor
    values_P: Tensor
    y_hat_BD: Tensor
    """[B, d_out] raw reconstructions"""

    @property
    def num_rows(self) -> int:
        return len(self.y_hat_BD)


@torch.no_grad()
def coded(sae: Dictionary, x_ND: Tensor) -> Iterator[Coded]:
    """Encodes and reconstructs rows, a bounded number at a time.

    Args:
        sae: for raw activations; rows go to its device.
        x_ND: [N, d_in] raw activations of any dtype.
    """
    d_sae, W_dec_FD = sae.cfg["d_sae"], sae.W_dec
    step = max(1, _CODES // d_sae)
    for start in range(0, len(x_ND), step):
        x_BD = x_ND[start : start + step].to(W_dec_FD.device, torch.float32)
        codes_BF = sae.encode(x_BD)
        rows_P, ids_P = codes_BF.nonzero(as_tuple=True)
        values_P = codes_BF[rows_P, ids_P]
        if len(ids_P) < _SPARSE_BELOW * codes_BF.numel():
            offsets_B = torch.searchsorted(rows_P, torch.arange(len(x_BD), device=rows_P.device))
            y_hat_BD = functional.embedding_bag(ids_P, W_dec_FD, offsets_B, mode="sum", per_sample_weights=values_P)
            y_hat_BD = y_hat_BD + sae.b_dec
        else:
            y_hat_BD = sae.decode(codes_BF)
        if sae.cfg.get("skip"):
            y_hat_BD = y_hat_BD + x_BD @ sae.W_skip.T
        yield Coded(slice(start, start + len(x_BD)), rows_P, ids_P, values_P, y_hat_BD)
