"""In how many rows each latent is active."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_ROWS = 127
"""As many as an int8 counts."""


def count_active(codes_BF: Tensor) -> Tensor:
    """[F] int64: the rows of [B, F] in which a code is above 0.

    Counted in int8 over so many rows as that holds: on CPU torch's own sum of a mask, in int64, takes several times as
    long, a tenth of a dense step.

    >>> count_active(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    tensor([1, 2])
    """
    active_BF = (codes_BF > 0).view(torch.int8)
    parts = [rows_NF.sum(dim=0, dtype=torch.int8) for rows_NF in torch.split(active_BF, INT8_ROWS)]
    return torch.stack(parts).sum(dim=0)
