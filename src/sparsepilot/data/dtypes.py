"""How activations lie on disk: which numpy dtype carries which torch dtype, and the int8 code with a scale per row."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Stored(NamedTuple):
    """One way of storing activations."""

    torch_dtype: torch.dtype
    """dtype of the tensors that hold stored rows in memory"""
    numpy_dtype: str
    """dtype of the zarr array"""
    fill: float | int
    """Fill value: one that no accepted row holds, so that a chunk of real rows is never left out as "empty" and a
    chunk that is missing could not pass for zeros."""


# zarr 3.1 has no bfloat16, so its bits are stored as uint16 (0xFFFF is a NaN, which the writer refuses).
STORED = {
    "float16": Stored(torch.float16, "float16", float("nan")),
    "bfloat16": Stored(torch.bfloat16, "uint16", 0xFFFF),
    "float32": Stored(torch.float32, "float32", float("nan")),
    "int8": Stored(torch.int8, "int8", -128),
}


def row_bytes(width: int, dtype: str) -> int:
    """Bytes of one stored row of one site, the int8 scale included."""
    return width * STORED[dtype].torch_dtype.itemsize + (4 if dtype == "int8" else 0)


def batch_dtype(*dtypes: str) -> torch.dtype:
    """dtype of batches of such rows: their own, fp32 for int8; of several the narrowest that holds them exactly."""
    return functools.reduce(
        torch.promote_types, (torch.float32 if dtype == "int8" else STORED[dtype].torch_dtype for dtype in dtypes)
    )


def as_numpy(x: Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it on disk (bfloat16 as uint16 bits); no copy."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def quantize(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 code of each row: (code [B, D] int8 in [-127, 127], scale [B] fp32), x ~ code * scale.

    scale = max |x| / 127 of the row (1 for a row of zeros), rounding to nearest: the error is at most scale / 2.
    """
    x_BD = x_BD.float()
    peak_B = x_BD.abs().amax(dim=1)
    scale_B = torch.where(peak_B > 0, peak_B / 127, torch.ones_like(peak_B))
    return (x_BD / scale_B[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_B


def dequantize(code_BD: Tensor, scale_B: Tensor) -> Tensor:
    """fp32 rows [B, D] of an int8 code."""
    return code_BD.float() * scale_B[:, None]
