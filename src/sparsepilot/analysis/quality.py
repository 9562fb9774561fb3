"""How well rows are reconstructed, and what each latent does on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from sparsepilot.metrics.activation import LatentActivation
from sparsepilot.metrics.cosine import Cosine
from sparsepilot.metrics.firing import LOG10_EDGES, FiringDensity
from sparsepilot.metrics.fvu import FVU
from sparsepilot.metrics.fvu_own_mean import OwnMeanFVU
from sparsepilot.metrics.l0 import L0
from sparsepilot.metrics.mse import MSE
from sparsepilot.metrics.norm_ratio import NormRatio

DENSE_ABOVE = 0.1
"""A latent that is active on a larger share of the rows is called dense."""


class Quality(nn.Module):
    """The metrics of one set of rows, in raw units.

    Args:
        mean_D: [d_out] mean of the training rows of what is reconstructed.
        d_sae: latents.
    """

    def __init__(self, mean_D: Tensor, d_sae: int) -> None:
        super().__init__()
        self.l0 = L0()
        of_rows: dict[str, Metric | MetricCollection] = {
            "fvu": FVU(mean_D),
            "fvu_own_mean": OwnMeanFVU(mean_D),
            "mse": MSE(),
            "cosine": Cosine(),
            "norm_ratio": NormRatio(),
        }
        self.of_rows = MetricCollection(of_rows, compute_groups=False)
        self.d_sae = d_sae
        self.num_rows = 0

    def update(self, y_BD: Tensor, y_hat_BD: Tensor, ids_P: Tensor) -> None:
        """y_BD, y_hat_BD: [B, d_out] raw targets and reconstructions; ids_P: [P] the latent of each active pair."""
        self.num_rows += len(y_BD)
        self.l0.update(torch.bincount(ids_P, minlength=self.d_sae), len(y_BD))
        self.of_rows.update(y_BD, y_hat_BD)

    def figures(self) -> dict[str, float]:
        """Each metric's value by name, and the number of rows."""
        found = {"l0": self.l0.compute(), **self.of_rows.compute()}
        return {"num_rows": self.num_rows, **{name: float(value) for name, value in found.items()}}


class Latents(nn.Module):
    """Density and strength of every latent."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.firing = FiringDensity(d_sae)
        self.activation = LatentActivation(d_sae)
        self.d_sae = d_sae

    def update(self, ids_P: Tensor, values_P: Tensor, num_rows: int) -> None:
        """ids_P, values_P: [P] latent and activation of each active pair of `num_rows` rows."""
        self.firing.update(torch.bincount(ids_P, minlength=self.d_sae), num_rows)
        self.activation.update(ids_P, values_P)

    def summary(self) -> dict[str, Any]:
        """Counts over all latents (inactive: on none of the rows), and the histogram of log10 of density."""
        density_F = self.firing.compute()
        return {
            "d_sae": self.d_sae,
            "inactive": int((density_F == 0).sum()),
            "dense": int((density_F > DENSE_ABOVE).sum()),
            "dense_above": DENSE_ABOVE,
            "firing_density_histogram": self.firing.histogram(),
            "log10_density_edges": list(LOG10_EDGES),
        }

    def each(self) -> dict[str, list[float]]:
        """Per latent: density, mean over the rows where it is active, maximum."""
        strength = self.activation.compute()
        columns = {"density": self.firing.compute(), "mean": strength["mean_F"], "max": strength["max_F"]}
        return {name: [float(f"{value:.6g}") for value in column.tolist()] for name, column in columns.items()}
