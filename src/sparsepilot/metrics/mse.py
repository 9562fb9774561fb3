"""MSE per element, in the units of the raw activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MSE(Metric):
    """Mean over rows and dimensions of (x - x_hat)^2.

    >>> metric = MSE()
    >>> metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]))
    >>> float(metric.compute())
    0.5
    """

    full_state_update = False
    sum_sq_error: Tensor
    num_elements: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum_sq_error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_elements", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        """x_BD, x_hat_BD: [B, D] inputs and reconstructions in the same units."""
        self.sum_sq_error += (x_BD - x_hat_BD).square().sum(dim=-1).double().sum()
        self.num_elements += x_BD.numel()

    def compute(self) -> Tensor:
        return self.sum_sq_error / self.num_elements
