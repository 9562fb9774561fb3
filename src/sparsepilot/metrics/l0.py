"""L0: how many latents are active on a row, on average."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class L0(Metric):
    """Mean number of non-zero codes per row.

    >>> metric = L0()
    >>> metric.update(torch.tensor([[0.5, 0.0, 2.0], [0.0, 0.0, 1.0]]))
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

    def update(self, codes_BK: Tensor) -> None:
        """codes_BK: [B, K] codes, sparse (K slots a row) or dense (K = d_sae)."""
        self.num_active += torch.count_nonzero(codes_BK)
        self.num_rows += codes_BK.shape[0]

    def compute(self) -> Tensor:
        return self.num_active.double() / self.num_rows
