"""How strongly each latent is active."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class LatentActivation(Metric):
    """For every latent its largest activation, and the mean over the rows on which it is active; 0 where it never is.

    >>> metric = LatentActivation(d_sae=3)
    >>> metric.update(torch.tensor([0, 2, 0]), torch.tensor([1.0, 5.0, 3.0]))
    >>> metric.compute()["mean_F"].tolist(), metric.compute()["max_F"].tolist()
    ([2.0, 0.0, 5.0], [3.0, 0.0, 5.0])
    """

    full_state_update = False
    num_active_F: Tensor
    sum_F: Tensor
    max_F: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.add_state("num_active_F", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sum_F", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("max_F", torch.full((d_sae,), -torch.inf), dist_reduce_fx="max")

    def update(self, ids_P: Tensor, values_P: Tensor) -> None:
        """ids_P, values_P: [P] latent and activation of each active pair of a row and a latent, in any order."""
        self.num_active_F += torch.bincount(ids_P, minlength=len(self.num_active_F))
        self.sum_F += torch.bincount(ids_P, weights=values_P.double(), minlength=len(self.sum_F))
        self.max_F.scatter_reduce_(0, ids_P, values_P.float(), "amax")

    def compute(self) -> dict[str, Tensor]:
        active_F = self.num_active_F > 0
        return {
            "mean_F": (self.sum_F / self.num_active_F).where(active_F, 0),
            "max_F": self.max_F.where(active_F, 0),
        }
