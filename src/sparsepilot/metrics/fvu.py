"""FVU: the fraction of variance unexplained, about the mean of the data."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class FVU(Metric):
    """sum ||x - x_hat||^2 / sum ||x - mean||^2, with the mean over the data, never zero.

    A tool that took zero for the mean reported 0.98 explained where the truth was 0.78: activations have a large mean.

    Args:
        mean_D: [D] mean of the data in the units of `x`; a run takes that of the cache's training rows, so that the
            denominator is the same for every batch, rank and run.

    >>> x = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    >>> metric = FVU(mean_D=x.mean(0))
    >>> metric.update(x, torch.tensor([[2.5, 1.0], [1.0, 1.5]]))
    >>> float(metric.compute())
    0.25
    """

    full_state_update = False
    sum_sq_error: Tensor
    sum_sq_deviation: Tensor
    mean_D: Tensor

    def __init__(self, mean_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_D", mean_D.detach().clone(), persistent=False)
        self.add_state("sum_sq_error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_sq_deviation", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        """x_BD, x_hat_BD: [B, D] inputs and reconstructions in the same units."""
        self.sum_sq_error += (x_BD - x_hat_BD).square().sum(dim=-1).double().sum()
        self.sum_sq_deviation += (x_BD - self.mean_D).square().sum(dim=-1).double().sum()

    def compute(self) -> Tensor:
        return self.sum_sq_error / self.sum_sq_deviation
