"""How well the windows mix a cache that was written document after document.

Rows are their document's own value plus noise, half of the variance each. The variance of batch means, relative to
that of independent rows, is averaged over 16 columns and all batches of a pass, which leaves a sampling error near 1%.
"""

from __future__ import annotations

import numpy as np
import pytest

from sparsepilot.data.order import Order

ROWS, DOCUMENT_ROWS, COLUMNS, BATCH, STREAMS = 1 << 18, 200, 16, 128, 16
SHARE = 0.5  # of the variance that lies between documents


def ratio(chunk_rows: int, window_rows: int, seed: int = 0) -> float:
    """Variance of batch means over one pass / (variance of rows / batch)."""
    rng = np.random.default_rng(seed)
    between = rng.standard_normal((ROWS // DOCUMENT_ROWS + 1, COLUMNS), dtype=np.float32)
    x = np.sqrt(SHARE) * np.repeat(between, DOCUMENT_ROWS, axis=0)[:ROWS]
    x += np.sqrt(1 - SHARE) * rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    order = Order(ROWS, chunk_rows, STREAMS, window_rows // STREAMS, seed)
    per_stream = ROWS // STREAMS
    count = BATCH // STREAMS
    streams = np.stack([order.rows(s, 0, per_stream).reshape(-1, count) for s in range(STREAMS)], axis=1)
    means = np.stack([x[rows.ravel()].mean(axis=0) for rows in streams])
    return float(means.var(axis=0).mean() / (x.var(axis=0).mean() / BATCH))


def bound(chunk_rows: int, window_rows: int) -> float:
    """The formula of order.py, rho m B / W (1 - W / N) above one."""
    run = min(chunk_rows, DOCUMENT_ROWS)
    return 1 + SHARE * run * BATCH / window_rows * (1 - window_rows / ROWS)


@pytest.mark.parametrize(("chunk_rows", "window_rows"), [(64, 1 << 17), (64, 1 << 16), (256, 1 << 18)])
def test_batch_means_vary_as_those_of_independent_rows(chunk_rows: int, window_rows: int) -> None:
    assert ratio(chunk_rows, window_rows) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("chunk_rows", "window_rows"), [(64, 1 << 12), (200, 1 << 13)])
def test_the_measure_sees_bad_mixing_and_the_formula_bounds_it(chunk_rows: int, window_rows: int) -> None:
    assert 1.5 < ratio(chunk_rows, window_rows) < bound(chunk_rows, window_rows)
