"""L0: how many latents are active on a row, on average."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class L0(Metric):
    """Mean number of non-zero codes per row.

    >>> metric = L0()
    >>> metric.update(torch.tensor([1, 0, 2]), num_rows=2)
    >>> float(metric.compute())
    1.5
    """

    full_state_update = False
    num_active: Tensor
    num_rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("num_active", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, firings_F: Tensor, num_rows: int) -> None:
        """firings_F: [F] int64, on how many of the `num_rows` rows each latent is active."""
        self.num_active += firings_F.sum()
        self.num_rows += num_rows

    def compute(self) -> Tensor:
        return self.num_active.double() / self.num_rows
