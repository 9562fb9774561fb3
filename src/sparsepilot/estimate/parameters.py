"""How many numbers a dictionary, its gradients and its optimizer hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STAND_IN = 8
"""Rows and columns of the matrix on which an optimizer shows what it remembers."""


class Counts(NamedTuple):
    """Numbers in the parameters of a dictionary."""

    matrices: int
    """in parameters of two dimensions"""
    vectors: int
    """in all others"""
    per_latent: int
    """of all of them, those that belong to latents: a parameter whose first dimension is d_sae"""

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.vectors


def count(shapes: Iterable[tuple[int, ...]], d_sae: int) -> Counts:
    """Counts parameters of the given shapes.

    >>> count([(512, 64), (512,), (512, 64), (64,)], d_sae=512)
    Counts(matrices=65536, vectors=576, per_latent=66048)
    """
    matrices = vectors = per_latent = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        if len(shape) == 2:
            matrices += size
        else:
            vectors += size
        if shape and shape[0] == d_sae:
            per_latent += size
    return Counts(matrices, vectors, per_latent)


def dictionary_counts(d_sae: int, encoder_width: int, d_out: int, vectors_per_latent: int = 1) -> Counts:
    """Those of a dictionary without a skip: W_enc [d_sae, encoder_width], W_dec [d_sae, d_out], b_dec [d_out], and
    `vectors_per_latent` of [d_sae] (b_enc; JumpReLU has 2, Gated 3).

    >>> dictionary_counts(16384, 2304, 2304)
    Counts(matrices=75497472, vectors=18688, per_latent=75513856)
    """
    shapes = [(d_sae, encoder_width), (d_sae, d_out), (d_out,), *[(d_sae,)] * vectors_per_latent]
    return count(shapes, d_sae)


class Remembered(NamedTuple):
    """Numbers that an optimizer keeps per number of a parameter."""

    per_matrix: float
    per_vector: float


def remembered(make: Callable[[list[dict[str, Any]]], Optimizer]) -> Remembered:
    """What an optimizer keeps, seen after a step on a small matrix and a small vector.

    Args:
        make: from parameter groups.

    >>> remembered(torch.optim.Adam), remembered(lambda groups: torch.optim.SGD(groups, momentum=0.9))
    (Remembered(per_matrix=2.0, per_vector=2.0), Remembered(per_matrix=1.0, per_vector=1.0))
    """
    parameters = [nn.Parameter(torch.zeros(STAND_IN, STAND_IN)), nn.Parameter(torch.zeros(STAND_IN))]
    optimizer = make([{"params": parameters}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def kept(parameter: nn.Parameter) -> float:
        tensors = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
        return sum(value.numel() for value in tensors if value.shape == parameter.shape) / parameter.numel()

    return Remembered(kept(parameters[0]), kept(parameters[1]))


def optimizer_numbers(counts: Counts, kept: Remembered) -> int:
    """Numbers in the state of an optimizer.

    >>> optimizer_numbers(Counts(1000, 10, 0), Remembered(1, 2))   # Muon on matrices, Adam on the rest
    1020
    """
    return round(counts.matrices * kept.per_matrix + counts.vectors * kept.per_vector)
