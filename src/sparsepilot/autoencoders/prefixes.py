"""Matryoshka dictionaries (Bussmann et al. 2025, arXiv 2503.17547): nested prefixes that each reconstruct the input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from sparsepilot.errors import ConfigError
from sparsepilot.ops import sparse
from sparsepilot.ops.active import ActiveSet
from sparsepilot.ops.seeded import generator_at


class Prefixes(ABC):
    """The loss is sum_g ||y - y_hat_g||^2 where y_hat_g uses the first `ends[g]` latents only; the last is all of them.

    A pair belongs to the segment between two ends. Segments are decoded once each, and prefixes are their running sums.
    """

    @abstractmethod
    def ends(self, d_sae: int, seed: int, samples: int) -> list[int]:
        """Ascending ends of the prefixes, the last one d_sae."""

    def inference_config(self, d_sae: int) -> dict[str, Any]:
        """What a saved dictionary says of its prefixes; JSON values only."""
        return {}

    def decode_at(self, codes_P: Tensor, W_dec_FD: Tensor, active: ActiveSet, ends: Sequence[int]) -> Tensor:
        """[B, G, D]: the reconstruction of every prefix, without b_dec."""
        num_segments = len(ends)
        ends_G = torch.tensor(ends, device=active.ids_P.device)
        bag_P = active.rows_P * num_segments + torch.bucketize(active.ids_P, ends_G, right=True)
        order_P = torch.sort(bag_P, stable=True).indices
        segments = ActiveSet.from_pairs(
            bag_P[order_P], active.ids_P[order_P], active.num_rows * num_segments, active.num_latents
        )
        parts = sparse.decode_at(codes_P.index_select(0, order_P), W_dec_FD, segments)
        return _running_sums(list(parts.view(active.num_rows, num_segments, -1).unbind(dim=1)))

    def decode_plain(self, codes_BF: Tensor, W_dec_FD: Tensor, ends: Sequence[int]) -> Tensor:
        """The dense twin of `decode_at`."""
        parts = [sparse.decode_plain(codes_BF[:, a:b], W_dec_FD[a:b]) for a, b in pairwise((0, *ends))]
        return _running_sums(parts)


def _running_sums(parts: Sequence[Tensor]) -> Tensor:
    """[B, G, D] from G times [B, D]; torch's cumsum has no deterministic form on CUDA."""
    return torch.stack(list(accumulate(parts, torch.add)), dim=1)


class FixedPrefixes(Prefixes):
    """The same prefixes in every step.

    Args:
        fractions: ascending shares of the dictionary; the whole of it is added where it is not among them.

    >>> FixedPrefixes([1 / 16, 1 / 4]).ends(1024, seed=0, samples=0)
    [64, 256, 1024]
    """

    def __init__(self, fractions: Sequence[PositiveFloat]) -> None:
        self.fractions = [float(f) for f in fractions]
        if not self.fractions or sorted(set(self.fractions)) != self.fractions or self.fractions[-1] > 1:
            raise ConfigError(
                f"model.prefixes.fractions = {list(fractions)}: ascending shares of the dictionary, each above 0 and "
                "at most 1, are needed"
            )

    def ends(self, d_sae: int, seed: int, samples: int) -> list[int]:
        ends = {max(1, round(f * d_sae)) for f in self.fractions} | {d_sae}
        return sorted(ends)

    def inference_config(self, d_sae: int) -> dict[str, Any]:
        return {"prefix_ends": self.ends(d_sae, seed=0, samples=0)}


class RandomPrefixes(Prefixes):
    """`count` prefixes drawn anew in each step, seeded by (seed, samples); the whole dictionary is always the last.

    Their lengths are log-uniform between 1 and d_sae and all different, so that the sum over them has one scale in all
    steps. (Nabeshima's matryoshka-saes takes the mean over prefixes instead of the sum, and another density.)

    >>> prefixes = RandomPrefixes(3)
    >>> prefixes.ends(1024, seed=0, samples=512) == prefixes.ends(1024, seed=0, samples=512)
    True
    >>> len(prefixes.ends(1024, seed=0, samples=512)), prefixes.ends(1024, seed=0, samples=512)[-1]
    (3, 1024)
    """

    def __init__(self, count: PositiveInt = 5) -> None:
        self.count = count

    def ends(self, d_sae: int, seed: int, samples: int) -> list[int]:
        make = generator_at(seed, samples)
        ends = {d_sae}
        while len(ends) < min(self.count, d_sae):
            ends.add(round(d_sae ** float(torch.rand((), generator=make, dtype=torch.float64))))
        return sorted(ends)
