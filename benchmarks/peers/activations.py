"""Activations for timing steps: the same rows for every tool, from a seed alone. Needs torch only.

A row is mean + factors @ basis + noise: few directions carry most of the variance, as in a language model's residual
stream, and there is an offset to subtract. All rows are scaled so that E||x||^2 = width.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows of one random stream; row numbers, not batches, decide what a row holds."""
NUM_FACTORS = 64
NOISE = 0.1
MEAN = 0.3


def activations(num_rows: int, width: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    """The first `num_rows` rows, [num_rows, width] in `dtype`; more rows begin with the same ones."""
    basis_KD = torch.randn(NUM_FACTORS, width, generator=_generator(seed, 0)) / NUM_FACTORS**0.5
    mean_D = MEAN * torch.randn(width, generator=_generator(seed, 1))
    mean_sq_norm = float(basis_KD.square().sum() + mean_D.square().sum()) + NOISE**2 * width
    scale = (width / mean_sq_norm) ** 0.5
    out_BD = torch.empty(num_rows, width, dtype=getattr(torch, dtype))
    for block, start in enumerate(range(0, num_rows, BLOCK_ROWS)):
        generator = _generator(seed, 2 + block)
        factors_BK = torch.randn(BLOCK_ROWS, NUM_FACTORS, generator=generator)
        x_BD = factors_BK @ basis_KD + NOISE * torch.randn(BLOCK_ROWS, width, generator=generator) + mean_D
        part_BD = out_BD[start : start + BLOCK_ROWS]
        part_BD.copy_(scale * x_BD[: len(part_BD)])
    return out_BD


def checksum(x_BD: Tensor) -> float:
    """A number by which two processes see that they hold the same rows (up to the rounding of a product)."""
    return round(float(x_BD.double().abs().sum()), 1)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
