"""Firing density: on which share of the rows each latent is active."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

LOG10_EDGES = tuple(-6 + 0.25 * i for i in range(25))
"""Edges of the histogram's 24 bins, in log10 of density, from 1e-6 to 1."""


class FiringDensity(Metric):
    """Counts firings per latent; gives density per latent and its histogram over log10.

    >>> metric = FiringDensity(d_sae=4)
    >>> metric.update(torch.tensor([2, 1, 0, 0]), num_rows=2)
    >>> metric.compute().tolist()
    [1.0, 0.5, 0.0, 0.0]
    """

    full_state_update = False
    num_fired_F: Tensor
    num_rows: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.add_state("num_fired_F", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, firings_F: Tensor, num_rows: int) -> None:
        """firings_F: [F] int64, on how many of the `num_rows` rows each latent is active."""
        self.num_fired_F += firings_F
        self.num_rows += num_rows

    def compute(self) -> Tensor:
        """[F] float64 densities."""
        return self.num_fired_F.double() / self.num_rows

    def histogram(self) -> list[int]:
        """Latents per bin of `LOG10_EDGES`; those that never fired are in none."""
        density_F = self.compute()
        logs = density_F[density_F > 0].log10().clamp(LOG10_EDGES[0], LOG10_EDGES[-1])
        counts = torch.histogram(logs.cpu(), torch.tensor(LOG10_EDGES, dtype=torch.float64)).hist
        return [int(c) for c in counts]
