"""Each latent as plain values: what the page and features.jsonl are both written from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsepilot.analysis.features.contexts import choose
from sparsepilot.analysis.features.directions import Best, Lens
from sparsepilot.analysis.features.kept import BEFORE, NO_TOKEN, Kept
from sparsepilot.analysis.features.score import Scorer
from sparsepilot.analysis.features.survey import Survey

_AT_ONCE = 256
DIGITS = 4


class Context(NamedTuple):
    row: int
    """Of the cache, where `peak` is."""
    peak: int
    """Index of the token that this context is shown for."""
    tokens: list[int]
    activations: list[float]


class Record(NamedTuple):
    """One latent. Values are rounded to DIGITS significant digits."""

    latent: int
    fires: int
    density: float
    max: float
    mean: float
    """Over the rows on which it fires."""
    score: float | None
    histogram: list[int]
    """One count per bin of `survey.bin_edges`."""
    promotes: list[tuple[int, float]]
    suppresses: list[tuple[int, float]]
    nearest: list[tuple[int, float]]
    top: list[Context]
    bands: list[list[Context]]
    """By quarters of its firings, the strongest first."""


def records(
    survey: Survey, scorer: Scorer, lens: Lens | None, near: Best, only: Collection[int] | None = None
) -> Iterator[Record]:
    """All latents in order, or those of `only`."""
    num_rows = max(1, survey.next_row)
    starts = range(0, survey.num_latents, _AT_ONCE) if only is None else sorted(only)
    for start in starts:
        latents = slice(start, min(start + (_AT_ONCE if only is None else 1), survey.num_latents))
        shown = choose(survey.top, survey.sample, latents)
        scores = scorer(survey.top, survey.sample, latents, shown)
        tops, samples = _Texts(survey.top, latents), _Texts(survey.sample, latents)
        fires_B = survey.fires_F[latents]
        density_B = rounded(fires_B / num_rows).tolist()
        mean_B = rounded(survey.sum_F[latents] / np.maximum(fires_B, 1)).tolist()
        max_B = rounded(survey.top.value_FN[latents].max(axis=1)).tolist()
        histogram_BH = survey.histogram_FH[latents].tolist()
        up, down = (None, None) if lens is None else (_Pairs(lens.promotes, latents), _Pairs(lens.suppresses, latents))
        beside = _Pairs(near, latents)
        for i, (each, score) in enumerate(zip(shown, scores, strict=True)):
            yield Record(
                latent=start + i,
                fires=int(fires_B[i]),
                density=density_B[i],
                max=max_B[i],
                mean=mean_B[i],
                score=None if score is None else round(score, DIGITS),
                histogram=histogram_BH[i],
                promotes=up.of(i) if up else [],
                suppresses=down.of(i) if down else [],
                nearest=beside.of(i),
                top=[tops.context(i, slot) for slot in each.top],
                bands=[[samples.context(i, slot) for slot in band] for band in each.bands],
            )


class _Texts:
    """Kept contexts of some latents as lists, which are read far faster one by one than arrays."""

    def __init__(self, kept: Kept, latents: slice) -> None:
        token_BNW = kept.token_FNW[latents]
        there_BNW = token_BNW != NO_TOKEN
        self._first = there_BNW.argmax(axis=2).tolist()
        self._num = there_BNW.sum(axis=2).tolist()  # in one piece, around BEFORE
        self._tokens = token_BNW.tolist()
        self._values = rounded(kept.value_FNW[latents]).tolist()
        self._rows = kept.row_FN[latents].tolist()

    def context(self, i: int, slot: int) -> Context:
        first, num = self._first[i][slot], self._num[i][slot]
        here = slice(first, first + num)
        return Context(self._rows[i][slot], BEFORE - first, self._tokens[i][slot][here], self._values[i][slot][here])


class _Pairs:
    def __init__(self, best: Best, latents: slice) -> None:
        self._ids = best.ids_FN[latents].tolist()
        self._values = rounded(best.values_FN[latents].numpy()).tolist()

    def of(self, i: int) -> list[tuple[int, float]]:
        return list(zip(self._ids[i], self._values[i], strict=True))


def rounded(values: NDArray[np.floating] | NDArray[np.integer]) -> NDArray[np.float64]:
    """To DIGITS significant digits.

    >>> rounded(np.array([0.0, 12.34567, -0.000123456, 98765.4])).tolist()
    [0.0, 12.35, -0.0001235, 98770.0]
    """
    x = np.asarray(values, dtype=np.float64)
    size = np.floor(np.log10(np.abs(x), where=x != 0, out=np.zeros_like(x)))
    # powers of ten that are whole numbers are exact, so that a quotient is the double nearest to its decimal digits
    places = DIGITS - 1 - size
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)
    near: NDArray[np.float64] = np.round(x * up / down) * down / up
    return near
