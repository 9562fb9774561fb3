"""FVU about the mean of the very rows that are measured, as other tools' evaluations have it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class OwnMeanFVU(Metric):
    """sum ||x - x_hat||^2 / sum ||x - mean||^2, the mean over all rows that were given to `update`.

    1 - explained variance of SAELens. `metrics.fvu.FVU` takes the mean of the training rows instead, which is the same
    for every set of rows; the two differ where a set is small, or holds what the training rows leave out.

    Args:
        origin_D: [D] any point near the mean: sum ||x - origin||^2 - n ||mean - origin||^2 then loses no digits.

    >>> x = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    >>> metric = OwnMeanFVU(torch.tensor([100.0, -7.0]))
    >>> for row, row_hat in zip(x, torch.tensor([[2.5, 1.0], [1.0, 1.5]])): metric.update(row[None], row_hat[None])
    >>> float(metric.compute())
    0.25
    """

    full_state_update = False
    origin_D: Tensor
    sum_sq_error: Tensor
    sum_sq_D: Tensor
    sum_D: Tensor
    num_rows: Tensor

    def __init__(self, origin_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("origin_D", origin_D.detach().clone(), persistent=False)
        self.add_state("sum_sq_error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_sq_D", torch.zeros(len(origin_D), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_D", torch.zeros(len(origin_D), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        """x_BD, x_hat_BD: [B, D] inputs and reconstructions in the same units."""
        centred_BD = x_BD - self.origin_D
        self.sum_sq_error += (x_BD - x_hat_BD).square().sum(dim=-1).double().sum()
        self.sum_sq_D += centred_BD.square().sum(dim=0).double()
        self.sum_D += centred_BD.sum(dim=0).double()
        self.num_rows += len(x_BD)

    def compute(self) -> Tensor:
        return self.sum_sq_error / (self.sum_sq_D - self.sum_D.square() / self.num_rows).sum()
