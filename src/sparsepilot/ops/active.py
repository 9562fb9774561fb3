"""The active set of a batch: which latents each row uses, seen from the rows and from the latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ByLatent(NamedTuple):
    """The same (row, latent) pairs sorted by latent: one bag of rows per latent, as `embedding_bag` wants them."""

    order_P: Tensor
    """[B*K] int64: where the p-th pair of this order lies in the flattened [B, K] set"""
    rows_P: Tensor
    """[B*K] int64: its row"""
    offsets_F: Tensor
    """[F] int64: where each latent's bag begins"""


class ActiveSet:
    """K latent ids per row. Sorting them by latent is needed by two gradients and done at most once."""

    def __init__(self, ids_BK: Tensor, num_latents: int) -> None:
        self.ids_BK = ids_BK
        self.num_latents = num_latents
        self._by_latent: ByLatent | None = None

    def by_latent(self) -> ByLatent:
        """The pairs sorted by latent, rows ascending within one (a stable sort, so that sums have one order)."""
        if self._by_latent is None:
            flat_P = self.ids_BK.reshape(-1)
            # int32 keys sort twice as fast; latent ids are far below 2^31
            order_P = torch.sort(flat_P.int(), stable=True).indices
            counts_F = torch.bincount(flat_P, minlength=self.num_latents)
            offsets_F = torch.cumsum(counts_F, 0) - counts_F
            rows_P = torch.div(order_P, self.ids_BK.shape[1], rounding_mode="floor")
            self._by_latent = ByLatent(order_P, rows_P, offsets_F)
        return self._by_latent
