"""Loss terms. Each is a sum over rows divided by the row count or by a constant, never a ratio of batch statistics, so
that micro-batches and ranks add up to the loss of one big batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(y_BD: Tensor, y_hat_BD: Tensor) -> Tensor:
    """Sum over rows and dimensions of (y - y_hat)^2, a scalar."""
    return F.mse_loss(y_hat_BD, y_BD, reduction="sum")  # one pass each way


def aux_k(sq_error: Tensor, mean_sq_residual: Tensor, floor: float = 0.0) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv 2406.04093): ||e - e_hat||^2 / ||e||^2 for the residual e = y - y_hat.

    Args:
        sq_error: mean over rows of ||e - e_hat||^2, where e_hat is decoded from dead latents without b_dec.
        mean_sq_residual: E||e||^2 per row. Training passes the previous optimizer step's all-reduced value: it moves
            slowly, needs no collective inside the forward pass, and is the same for any split of the batch.
        floor: where the residual is no more than this, there is nothing left to explain and the loss is 0.
    """
    return sq_error * torch.where(mean_sq_residual > floor, 1 / mean_sq_residual, 0.0)
