"""Loss terms. Each is a sum over rows divided by the row count or by a constant, never a ratio of batch statistics, so
that micro-batches and ranks add up to the loss of one big batch."""

from __future__ import annotations

from torch import Tensor


def reconstruction(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """Mean over rows of ||x - x_hat||^2 (summed over dimensions), a scalar."""
    return (x_BD - x_hat_BD).square().sum(dim=-1).mean()


def aux_k(e_BD: Tensor, e_hat_BD: Tensor, mean_sq_residual: Tensor) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv 2406.04093): ||e - e_hat||^2 / ||e||^2 for the residual e = x - x_hat.

    Args:
        e_BD: [B, D] residual of the main reconstruction, detached by the caller.
        e_hat_BD: [B, D] its reconstruction from dead latents, decoded without b_dec.
        mean_sq_residual: E||e||^2 per row. Training passes the previous optimizer step's all-reduced value: it moves
            slowly, needs no collective inside the forward pass, and is the same for any split of the batch.
    """
    return (e_BD - e_hat_BD).square().sum(dim=-1).mean() / mean_sq_residual
