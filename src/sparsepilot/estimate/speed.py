"""How long a step takes: arithmetic and bytes against a device's data sheet, or from timed steps of smaller sizes."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from sparsepilot.estimate.devices import Device, Efficiency

FP32, BF16 = 4, 2
ROW_PASSES = 12
"""Times that rows are read or written in fp32 in a sparse step: scaling, centring, loss, gradients, measurements."""
DENSE_PASSES = 30
"""The same of a dense tile's elements: codes, penalty and masks, forward, again, and backward."""
DENSE_PRODUCTS = 7
"""Two forward, the same two computed again, three backward (no gradient reaches the rows)."""
PARAMETER_PASSES = 11
"""Times that each number of a parameter or its gradient is read or written, optimizer state aside: bfloat16 copy,
writing gradients, projection, norm, clipping, the step, unit rows."""


class Work(NamedTuple):
    """What one rank does in a step."""

    bf16_flops: float
    fp32_flops: float
    moved_bytes: float
    """to and from the device's memory"""

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: int) -> Work:
        """So many of it."""
        return Work(*(number * a for a in self))


NOTHING = Work(0.0, 0.0, 0.0)


def sparse_work(
    rows: int, latents: int, width: int, d_out: int, pairs: int, *, half: bool, spare_pairs: int = 0, wide: bool = False
) -> Work:
    """Finding the active pairs and everything at them, forward and backward.

    One product of 2 B F D operations, whose tiles are written and read once; rows of the matrices are read at each
    pair: once for its value (and at `spare_pairs`), once to decode, and three times backward, where both gradients are
    written whole. `wide`: decoded twice.

    >>> round(sparse_work(4096, 16384, 576, 576, 4096 * 32, half=True).bf16_flops / 1e9, 1)
    77.3
    """
    flops = 2.0 * rows * latents * width
    tile = 2.0 * rows * latents * (BF16 if half else FP32)
    decoding = 2 if wide else 1
    at_pairs = FP32 * ((pairs + spare_pairs) * width * half + pairs * width + 3.0 * decoding * pairs * d_out)
    gradients = FP32 * latents * (width + d_out)
    around = FP32 * ROW_PASSES * rows * (width + d_out) / 2
    moved = tile + at_pairs + gradients + around
    return Work(flops, 0.0, moved) if half else Work(0.0, flops, moved)


def dense_work(rows: int, latents: int, width: int, d_out: int, *, mixed: bool) -> Work:
    """The dense path: every pair, in products of fp32 (bfloat16 under bf16-mixed).

    >>> round(dense_work(4096, 16384, 576, 576, mixed=False).fp32_flops / 1e9, 1)
    541.2
    """
    flops = DENSE_PRODUCTS * float(rows) * latents * (width + d_out)
    moved = FP32 * (DENSE_PASSES * float(rows) * latents + ROW_PASSES * rows * (width + d_out) / 2)
    return Work(flops, 0.0, moved) if mixed else Work(0.0, flops, moved)


def parameter_work(numbers: int, remembered: int, matrix_shapes: list[tuple[int, int]], newton_schulz: int = 0) -> Work:
    """Clipping and the optimizer: each number of parameters, gradients and what the optimizer remembers, and Muon's
    `newton_schulz` iterations of two products of 2 m m n operations each on a matrix of m rows and n > m columns.

    >>> parameter_work(1000, 2000, [])
    Work(bf16_flops=0.0, fp32_flops=0.0, moved_bytes=60000.0)
    """
    moved = float(FP32 * (PARAMETER_PASSES * numbers + 2 * remembered))
    flops = 0.0
    for sides in matrix_shapes:
        m, n = min(sides), max(sides)
        flops += newton_schulz * 4.0 * m * m * n
        moved += newton_schulz * BF16 * 4.0 * m * n
    return Work(flops, 0.0, moved)


class StepTime(NamedTuple):
    """Seconds of a step by what they go into; nothing is assumed to overlap."""

    products_s: float
    memory_s: float
    links_s: float
    launches_s: float

    @property
    def total_s(self) -> float:
        """Their sum."""
        return sum(self)


def roofline(work: Work, links_s: float, micro_batches: int, device: Device, efficiency: Efficiency) -> StepTime:
    """Seconds of a step on a device, from its data sheet and assumed shares of it.

    Args:
        work: of one rank.
        links_s: what its messages would take at the links' full speed.
        micro_batches: per step.
        device: whose figures.
        efficiency: shares that are reached.

    >>> from sparsepilot.estimate.devices import device as known
    >>> work = Work(bf16_flops=989.4e12, fp32_flops=0, moved_bytes=3350e9)
    >>> roofline(work, 0.0, 1, known("h100"), Efficiency(products=0.5, memory=1.0, launch_s=0.0)).total_s
    3.0
    """
    products = work.bf16_flops / device.bf16_flops + work.fp32_flops / device.fp32_flops
    return StepTime(
        products / efficiency.products,
        work.moved_bytes / device.memory_bandwidth / efficiency.memory,
        links_s / efficiency.links,
        efficiency.launch_s * micro_batches,
    )


class Corner(NamedTuple):
    """A timed step."""

    rows: int
    latents: int
    seconds: float


def from_corners(corners: list[Corner], rows: int, latents: int) -> float:
    """Seconds of a step of `rows` rows and `latents` latents from timed steps of other sizes of the same model.

    A step is seconds = a + b B + c F + d B F: what is done once, per row (and pair), per latent (gradients, optimizer),
    and per row and latent (the product and the selection). Four corners, two numbers of rows by two of latents, settle
    a, b, c and d; none is below 0, so where noise says otherwise the nearest that is possible is taken.

    Args:
        corners: timed; of two numbers of rows and two of latents.
        rows, latents: wanted.

    >>> truth = lambda B, F: 0.001 + 2e-6 * B + 3e-6 * F + 4e-9 * B * F
    >>> corners = [Corner(B, F, truth(B, F)) for B in (512, 1024) for F in (2048, 4096)]
    >>> round(from_corners(corners, 4096, 16384) / truth(4096, 16384), 6)
    1.0
    """
    terms = np.array([_terms(c.rows, c.latents) for c in corners]) / np.array([c.seconds for c in corners])[:, None]
    best = (math.inf, np.zeros(NUM_TERMS))
    for chosen in itertools.product((False, True), repeat=NUM_TERMS):  # 16 least squares, each with some terms at 0
        columns = np.flatnonzero(chosen)
        found = np.zeros(NUM_TERMS)
        found[columns] = np.linalg.lstsq(terms[:, columns], np.ones(len(corners)), rcond=None)[0]
        if (found >= 0).all():
            error = float(((terms @ found - 1) ** 2).sum())
            if error < best[0]:
                best = (error, found)
    return float(best[1] @ _terms(rows, latents))


NUM_TERMS = 4


def _terms(rows: int, latents: int) -> np.ndarray:
    """What a, b, c and d are multiplied with, in thousands of rows and latents."""
    b, f = rows / 1e3, latents / 1e3
    return np.array([1.0, b, f, b * f])
