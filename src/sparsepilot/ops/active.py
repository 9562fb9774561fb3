"""The active set of a batch: which latents each row uses, seen from the rows and from the latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ByLatent(NamedTuple):
    """The same (row, latent) pairs sorted by latent: one bag of rows per latent, as `embedding_bag` wants them."""

    order_P: Tensor
    """[P] int64: where the p-th pair of this order lies in the row-major order"""
    rows_P: Tensor
    """[P] int64: its row"""
    offsets_F: Tensor
    """[F] int64: where each latent's bag begins"""


class ActiveSet:
    """P pairs (row, latent) in row-major order: `ids_P` holds the latents, `offsets_B` where each row's pairs begin.

    Rows may have any number of pairs, none included. The view from the latents, which two gradients need, is made at
    most once.
    """

    def __init__(self, ids_P: Tensor, offsets_B: Tensor, num_latents: int, rows_P: Tensor | None = None) -> None:
        self.ids_P = ids_P
        self.offsets_B = offsets_B
        self.num_latents = num_latents
        self._rows_P = rows_P
        self._by_latent: ByLatent | None = None

    @classmethod
    def from_topk(cls, ids_BK: Tensor, num_latents: int) -> ActiveSet:
        """The same number of latents in each row."""
        num_rows, k = ids_BK.shape
        offsets_B = torch.arange(0, num_rows * k, k, device=ids_BK.device)
        return cls(ids_BK.reshape(-1), offsets_B, num_latents)

    @classmethod
    def from_pairs(cls, rows_P: Tensor, ids_P: Tensor, num_rows: int, num_latents: int) -> ActiveSet:
        """Pairs whose rows ascend."""
        counts_B = torch.bincount(rows_P, minlength=num_rows)
        return cls(ids_P, torch.cumsum(counts_B, 0) - counts_B, num_latents, rows_P)

    @property
    def num_rows(self) -> int:
        """Rows of the batch, with and without pairs."""
        return self.offsets_B.shape[0]

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.ids_P.shape[0]

    @property
    def rows_P(self) -> Tensor:
        """[P] int64: the row of each pair."""
        if self._rows_P is None:
            ends_B = torch.cat([self.offsets_B[1:], self.offsets_B.new_tensor([self.num_pairs])])
            rows_B = torch.arange(self.num_rows, device=self.ids_P.device)
            self._rows_P = rows_B.repeat_interleave(ends_B - self.offsets_B, output_size=self.num_pairs)
        return self._rows_P

    def by_latent(self) -> ByLatent:
        """The pairs sorted by latent, rows ascending within one (a stable sort, so that sums have one order)."""
        if self._by_latent is None:
            # int32 keys sort twice as fast; latent ids are far below 2^31
            order_P = torch.sort(self.ids_P.int(), stable=True).indices
            counts_F = torch.bincount(self.ids_P, minlength=self.num_latents)
            self._by_latent = ByLatent(order_P, self.rows_P[order_P], torch.cumsum(counts_F, 0) - counts_F)
        return self._by_latent
