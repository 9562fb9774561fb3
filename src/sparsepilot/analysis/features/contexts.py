"""Which of the kept contexts are shown: distinct ones from the top, some from each quarter of all firings."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsepilot.analysis.features.kept import BEFORE, Kept

SHOWN_TOP = 12
BANDS = 4
SHOWN_PER_BAND = 3
_SAME_BEFORE, _SAME_AFTER = 8, 2
"""Contexts that agree from so many tokens before the peak to so many after it count as one: a text that repeats."""


class Shown(NamedTuple):
    """The contexts of one latent, as slots of `Survey.top` and `Survey.sample`, each list from the largest down."""

    top: list[int]
    bands: list[list[int]]
    """Of the sample, by quarters of its order: the largest first. None that `top` has."""


def choose(top: Kept, sample: Kept, latents: slice) -> list[Shown]:
    """The contexts to show of consecutive latents."""
    top_BN, distinct_BN = _ordered(top, latents)
    sample_BN, other_BN = _ordered(sample, latents)
    there_BN = np.take_along_axis(sample.key_FN[latents], sample_BN, axis=1) > 0
    shown = []
    top_rows_BN, sample_rows_BN = top.row_FN[latents], sample.row_FN[latents]
    for i, (slots_N, distinct_N, drawn_N, other_N, there_N) in enumerate(
        zip(top_BN, distinct_BN, sample_BN, other_BN, there_BN, strict=True)
    ):
        best = slots_N[distinct_N][:SHOWN_TOP]
        other_N &= ~np.isin(sample_rows_BN[i][drawn_N], top_rows_BN[i][best])
        ends = np.linspace(0, there_N.sum(), BANDS + 1).round().astype(int)
        bands = [drawn_N[a:b][other_N[a:b]][:SHOWN_PER_BAND].tolist() for a, b in pairwise(ends)]
        shown.append(Shown(best.tolist(), bands))
    return shown


def _ordered(kept: Kept, latents: slice) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[B, n] slots from the largest activation down, and which of them differ from all before them."""
    key_BN, value_BN = kept.key_FN[latents], kept.value_FN[latents]
    order_BN = np.lexsort((kept.row_FN[latents], -np.where(key_BN > 0, value_BN, -1)), axis=1)
    near = slice(BEFORE - _SAME_BEFORE, BEFORE + _SAME_AFTER + 1)
    factors_w = np.random.default_rng(0).integers(1, 2**63, near.stop - near.start, dtype=np.uint64) | np.uint64(1)
    texts_BNw = kept.token_FNW[latents][:, :, near].astype(np.int64).astype(np.uint64)
    digest_BN = (texts_BNw * factors_w).sum(axis=2)
    digest_BN = np.take_along_axis(digest_BN, order_BN, axis=1)
    same_BNN = digest_BN[:, :, None] == digest_BN[:, None, :]
    repeats_BN = np.tril(same_BNN, -1).any(axis=2)
    return order_BN, ~repeats_BN & (np.take_along_axis(key_BN, order_BN, axis=1) > 0)
