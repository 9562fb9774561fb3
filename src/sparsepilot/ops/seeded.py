"""Randomness in training: a function of the run's seed and the sample clock, so that nothing of it need be saved."""

from __future__ import annotations

import torch


def generator_at(seed: int, samples: int) -> torch.Generator:
    """A CPU generator for what is random in the step that ends at `samples`; the same on every rank."""
    return torch.Generator().manual_seed((seed * 1_000_003 + samples) % 2**63)
