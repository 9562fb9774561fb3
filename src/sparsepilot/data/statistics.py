"""Per-dimension sums of a site: additive over shards, so that any number of writers gives the same statistics."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_BLOCK_ROWS = 4096


class Moments(NamedTuple):
    """Row count, sum and sum of squares per dimension, in fp64."""

    num_rows: int
    sum_D: np.ndarray
    sum_squares_D: np.ndarray

    def plus(self, other: Moments) -> Moments:
        return Moments(
            self.num_rows + other.num_rows, self.sum_D + other.sum_D, self.sum_squares_D + other.sum_squares_D
        )

    def to_json(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows, "sum": self.sum_D.tolist(), "sum_squares": self.sum_squares_D.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Moments:
        return cls(value["num_rows"], np.array(value["sum"]), np.array(value["sum_squares"]))


class SiteStats(NamedTuple):
    """Statistics of a site's training rows, as they are read back from the cache."""

    mean_D: Tensor
    """[d] fp32"""
    variance_D: Tensor
    """[d] fp32, about the mean, divided by the number of rows"""
    mean_sq_norm: float
    """E ||x||^2"""
    scale: float
    """sqrt(d / E ||x||^2): rows times this have E ||x||^2 = d"""


def moments(x_BD: Tensor) -> Moments:
    """Sums over the rows of `x_BD`, in blocks of fixed size and by one thread: the same rows give the same bits."""
    width = x_BD.shape[1]
    sum_D, sum_squares_D = np.zeros(width), np.zeros(width)
    for start in range(0, len(x_BD), _BLOCK_ROWS):
        block = x_BD[start : start + _BLOCK_ROWS].to(torch.float64).numpy()
        sum_D += block.sum(axis=0)
        sum_squares_D += np.square(block, out=block).sum(axis=0)
    return Moments(len(x_BD), sum_D, sum_squares_D)


def no_moments(width: int) -> Moments:
    """The sums of no rows."""
    return Moments(0, np.zeros(width), np.zeros(width))


def site_stats(total: Moments) -> SiteStats:
    mean_D = total.sum_D / total.num_rows
    variance_D = np.maximum(total.sum_squares_D / total.num_rows - mean_D**2, 0)
    mean_sq_norm = float(total.sum_squares_D.sum() / total.num_rows)
    scale = math.sqrt(len(mean_D) / mean_sq_norm) if mean_sq_norm > 0 else 1.0
    return SiteStats(torch.from_numpy(mean_D).float(), torch.from_numpy(variance_D).float(), mean_sq_norm, scale)
