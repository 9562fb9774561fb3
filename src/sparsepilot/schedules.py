"""Learning rates as pure functions of the sample clock.

Each takes `samples` (rows seen so far, over all ranks) and `total_samples` (the budget) and returns the learning rate
of the next step. Hydra binds the other arguments (`_partial_: true`); the same function draws the picture in a report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from pydantic import NonNegativeFloat, NonNegativeInt

REFERENCE = ((0, 1e-4), (25e6, 8e-4), (50e6, 8e-4), (50e6, 6e-4), (1e9, 6e-4), (1.825e9, 2.7e-4))
"""(samples, learning rate), joined linearly; two points at one place are a jump, the later one holds from there on."""


def constant(samples: int, total_samples: int, lr: NonNegativeFloat, warmup_samples: NonNegativeInt = 0) -> float:
    """`lr`, after a linear rise from 0 over `warmup_samples`.

    >>> constant(0, 1000, lr=1e-3), constant(50, 1000, lr=1e-3, warmup_samples=100)
    (0.001, 0.0005)
    """
    return lr * _warmup(samples, warmup_samples)


def linear(
    samples: int,
    total_samples: int,
    lr: NonNegativeFloat,
    warmup_samples: NonNegativeInt = 0,
    final_factor: NonNegativeFloat = 0.0,
) -> float:
    """Rises linearly over `warmup_samples`, then falls linearly to `final_factor * lr` at the end of the budget.

    >>> linear(500, 1000, lr=1e-3)
    0.0005
    """
    done = _fraction(samples, warmup_samples, total_samples)
    return lr * _warmup(samples, warmup_samples) * (1 - done * (1 - final_factor))


def cosine(
    samples: int,
    total_samples: int,
    lr: NonNegativeFloat,
    warmup_samples: NonNegativeInt = 0,
    final_factor: NonNegativeFloat = 0.0,
) -> float:
    """Rises linearly over `warmup_samples`, then half a cosine down to `final_factor * lr` (SGDR, arXiv 1608.03983).

    >>> round(cosine(500, 1000, lr=1e-3), 9)
    0.0005
    """
    done = _fraction(samples, warmup_samples, total_samples)
    factor = final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * done))
    return lr * _warmup(samples, warmup_samples) * factor


def warmup_stable_decay(
    samples: int,
    total_samples: int,
    lr: NonNegativeFloat,
    warmup_samples: NonNegativeInt = 0,
    decay_fraction: NonNegativeFloat = 0.2,
    final_factor: NonNegativeFloat = 0.0,
) -> float:
    """Rises, stays at `lr`, and falls linearly over the last `decay_fraction` of the budget.

    >>> [warmup_stable_decay(s, 1000, lr=1.0) for s in (0, 800, 900, 1000)]
    [1.0, 1.0, 0.5, 0.0]
    """
    decay_samples = max(1.0, decay_fraction * total_samples)
    done = min(1.0, max(0.0, (samples - (total_samples - decay_samples)) / decay_samples))
    return lr * _warmup(samples, warmup_samples) * (1 - done * (1 - final_factor))


def reference(
    samples: int,
    total_samples: int,
    scale_to_budget: bool = False,
    breakpoints: Sequence[Sequence[float]] = REFERENCE,
) -> float:
    """Piecewise linear through `breakpoints` (samples, learning rate), constant before the first and after the last.

    With `scale_to_budget` the sample axis is stretched so that the last breakpoint falls on the end of the budget.

    >>> [reference(int(s), 2_000_000_000) for s in (0, 25e6, 49e6, 50e6, 1e9, 1.825e9)]
    [0.0001, 0.0008, 0.0008, 0.0006, 0.0006, 0.00027]
    >>> reference(1000, 1000, scale_to_budget=True)
    0.00027
    """
    stretch = total_samples / breakpoints[-1][0] if scale_to_budget else 1.0
    if samples < breakpoints[0][0] * stretch:
        return float(breakpoints[0][1])
    for (start, lr_start), (end, lr_end) in pairwise(breakpoints):
        start, end = start * stretch, end * stretch
        if start <= samples < end:
            return float(lr_start + (lr_end - lr_start) * (samples - start) / (end - start))
    return float(breakpoints[-1][1])


def _warmup(samples: int, warmup_samples: int) -> float:
    return 1.0 if samples >= warmup_samples else samples / warmup_samples


def _fraction(samples: int, start: int, end: int) -> float:
    """How far `samples` has come from `start` to `end`, within [0, 1]."""
    return min(1.0, max(0.0, (samples - start) / max(1, end - start)))
