"""Undoing at inference what a penalty takes from the size of all codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
"""What the averages keep of themselves in each optimizer step."""


class Rescaling(nn.Module):
    """One factor on all codes, the one that brings reconstructions closest to their targets.

    With d = sum_i f_i W_dec[i] and z = y - b_dec what it is to be (less the skip's part), E||z - c d||^2 is smallest at
    c = E<z, d> / E<d, d>. A penalty on the size of codes makes that larger than 1 (Wright & Sharkey 2024, "Addressing
    feature suppression in SAEs"; 1 / c is the relative reconstruction bias of Rajamanoharan et al. 2024, arXiv
    2404.16014). The loss never has it: a factor that the penalty does not reach would let codes go to zero. Which
    latents are active does not change.
    """

    measures = ("decoded_squared", "decoded_times_target")
    products_2: Tensor
    """[2] running means of <d, d> and <z, d> over global batches; zeros before the first step"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("products_2", torch.zeros(2))

    @property
    def factor(self) -> Tensor:
        """Scalar c; 1 before the first step, and while reconstructions point away from their targets."""
        squared, times_target = self.products_2
        return torch.where((squared > 0) & (times_target > 0), times_target / squared, 1.0)

    @torch.no_grad()
    def measure(self, y_hat_BD: Tensor, y_BD: Tensor, rest_BD: Tensor) -> dict[str, Tensor]:
        """Sums over rows of <d, d> and <z, d>, by the names in `measures`; `rest` is b_dec and the skip's part."""
        d_BD = y_hat_BD - rest_BD
        # row by row: a product of all would be one more tensor of the size of the rows
        sums = [torch.linalg.vecdot(d_BD, d_BD).sum(), torch.linalg.vecdot(y_BD - rest_BD, d_BD).sum()]
        return dict(zip(self.measures, sums, strict=True))

    @torch.no_grad()
    def update(self, terms: dict[str, Tensor]) -> None:
        """Takes in their means over a global batch."""
        now_2 = torch.stack([terms[name] for name in self.measures])
        kept = torch.where(self.products_2[0] > 0, MOMENTUM, 0.0)
        self.products_2.copy_(kept * self.products_2 + (1 - kept) * now_2)
