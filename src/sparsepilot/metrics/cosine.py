"""Cosine similarity of rows and their reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric


class Cosine(Metric):
    """Mean over rows of x . x_hat / (||x|| ||x_hat||), about zero.

    >>> metric = Cosine()
    >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    >>> round(float(metric.compute()), 4)
    0.8536
    """

    full_state_update = False
    sum_cosine: Tensor
    num_rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum_cosine", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        """x_BD, x_hat_BD: [B, D] inputs and reconstructions; a row of zeros counts as 0."""
        self.sum_cosine += cosine_similarity(x_BD, x_hat_BD, dim=1).double().sum()
        self.num_rows += len(x_BD)

    def compute(self) -> Tensor:
        return self.sum_cosine / self.num_rows
