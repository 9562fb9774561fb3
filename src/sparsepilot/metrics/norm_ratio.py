"""Norm ratio: how much a reconstruction is shrunk."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class NormRatio(Metric):
    """Mean over rows of ||x_hat|| / ||x||; rows of zeros are left out.

    >>> metric = NormRatio()
    >>> metric.update(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]]))
    >>> metric.update(torch.zeros(1, 2), torch.ones(1, 2))
    >>> round(float(metric.compute()), 6)
    0.9
    """

    full_state_update = False
    sum_ratio: Tensor
    num_rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum_ratio", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        """x_BD, x_hat_BD: [B, D] inputs and reconstructions in the same units."""
        norm_B = x_BD.norm(dim=1).double()
        ratio_B = x_hat_BD.norm(dim=1).double() / norm_B
        self.sum_ratio += ratio_B.where(norm_B > 0, 0).sum()
        self.num_rows += (norm_B > 0).sum()

    def compute(self) -> Tensor:
        return self.sum_ratio / self.num_rows
