"""features.jsonl, for automated interpretation: one latent a line, with the texts on which it fires."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sparsepilot.analysis.features.records import Context, Record

BAND_NAMES = ("75-100%", "50-75%", "25-50%", "0-25%")
"""Of a latent's firings in the order of their activations, in the order of `Record.bands`."""


def line(record: Record, texts: Sequence[str], edges: Sequence[float]) -> str:
    """One line of features.jsonl; `texts` are those of the tokens by id, `edges` those of the histogram's bins."""

    def context(each: Context) -> dict[str, Any]:
        return {
            "row": each.row,
            "peak": each.peak,
            "tokens": [texts[token] for token in each.tokens],
            "activations": each.activations,
        }

    first, counts = trimmed(record.histogram)
    value = {
        "latent": record.latent,
        "density": record.density,
        "fires": record.fires,
        "max_activation": record.max,
        "mean_activation": record.mean,
        "score": record.score,
        "histogram": {"edges": list(edges[first : first + len(counts) + 1]) if counts else [], "counts": counts},
        "promotes": [{"token": texts[token], "logit": logit} for token, logit in record.promotes],
        "suppresses": [{"token": texts[token], "logit": logit} for token, logit in record.suppresses],
        "nearest": [{"latent": latent, "cosine": cosine} for latent, cosine in record.nearest],
        "top_contexts": [context(each) for each in record.top],
        "quantile_contexts": {
            name: [context(each) for each in band] for name, band in zip(BAND_NAMES, record.bands, strict=True)
        },
    }
    return json.dumps(value, separators=(",", ":")) + "\n"


def trimmed(counts: Sequence[int]) -> tuple[int, list[int]]:
    """Counts without the empty bins at either end, and the place of the first that is left.

    >>> trimmed([0, 0, 3, 0, 1, 0])
    (2, [3, 0, 1])
    >>> trimmed([0, 0])
    (0, [])
    """
    hit = [i for i, count in enumerate(counts) if count]
    return (hit[0], list(counts[hit[0] : hit[-1] + 1])) if hit else (0, [])


def table_row(record: Record, texts: Sequence[str]) -> dict[str, Any]:
    """One row of sample.json, which W&B shows as a table."""

    def marked(context: Context) -> str:
        parts = [texts[token] for token in context.tokens]
        parts[context.peak] = f"[[{parts[context.peak]}]]"
        return "".join(parts)

    return {
        "latent": record.latent,
        "score": record.score,
        "density": record.density,
        "max_activation": record.max,
        "promotes": " ".join(repr(texts[token]) for token, _ in record.promotes[:8]),
        "suppresses": " ".join(repr(texts[token]) for token, _ in record.suppresses[:8]),
        "nearest": " ".join(f"{latent} ({cosine:.2f})" for latent, cosine in record.nearest[:3]),
        "contexts": "\n---\n".join(marked(context) for context in record.top[:3]),
    }
