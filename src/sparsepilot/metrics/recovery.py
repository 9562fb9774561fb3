"""Recovery of a planted dictionary, where the data has a truth."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

BLOCK_COSINES = 2**21
"""Cosines at once: all T x F of them with F unit rows would be the largest thing that a run ever holds."""


class DictionaryRecovery(Metric):
    """Mean over the true features of the largest cosine similarity with any decoder row (MMCS, Sharkey et al. 2022).

    Args:
        features_TD: [T, D] the planted directions.

    >>> metric = DictionaryRecovery(torch.eye(2))
    >>> metric.update(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    >>> round(float(metric.compute()), 4)
    0.8536
    """

    full_state_update = False
    features_TD: Tensor
    cosine_T: Tensor

    def __init__(self, features_TD: Tensor) -> None:
        super().__init__()
        unit_TD = torch.nn.functional.normalize(features_TD.float(), dim=1)
        self.register_buffer("features_TD", unit_TD, persistent=False)
        self.add_state("cosine_T", torch.full((unit_TD.shape[0],), -1.0), dist_reduce_fx="max")

    def update(self, W_dec_FD: Tensor) -> None:
        """W_dec_FD: [F, D] decoder rows of any length, raw or scaled (cosine does not mind)."""
        for rows_ND in torch.split(W_dec_FD, max(1, BLOCK_COSINES // len(self.features_TD))):
            unit_ND = torch.nn.functional.normalize(rows_ND.float(), dim=1)
            best_T = (self.features_TD @ unit_ND.T).amax(dim=1)
            self.cosine_T = torch.maximum(self.cosine_T, best_T)

    def compute(self) -> Tensor:
        return self.cosine_T.mean()
