"""What the loaders, and a run, need of the place where rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from sparsepilot.data.statistics import SiteStats


class RowSource(Protocol):
    """Numbered rows: [0, num_train_rows) train, the `num_val_rows` behind them validate.

    A row has the same bits whenever, in whatever company and by whichever rank it is read. `data.cache.Cache` reads
    them from disk, `together.Caches` from several caches, `sparsepilot.live.LiveRows` makes them when they are wanted.
    Methods may be called from several threads at once.
    """

    widths: dict[str, int]
    """of each site"""

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the rows depend on."""

    @property
    def source(self) -> dict[str, Any]:
        """Where the rows come from, as JSON."""

    @property
    def num_train_rows(self) -> int: ...

    @property
    def num_val_rows(self) -> int: ...

    @property
    def chunk_rows(self) -> int:
        """Rows that are read, or made, together; the most, where that differs."""

    def dtype_of(self, site: str) -> str:
        """How rows of a site are stored: a key of `dtypes.STORED`."""

    def row_bytes(self, site: str) -> int:
        """Bytes of one stored row of a site."""

    def stats(self, site: str) -> SiteStats:
        """Mean, variance and scale of the site's training rows."""

    def read(self, site: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a site, [stop - start, width]; int8 is decoded to fp32."""

    def empty(self, site: str, num_rows: int) -> Tensor:
        """Uninitialised memory for stored rows of a site."""

    def fill(self, start: int, rows: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        """Fills rows[site], [n, width] stored, with the n rows of each site from `start` on; with int8 scales[site],
        too, [n] fp32."""

    def planted_features(self) -> Tensor | None:
        """The true dictionary [num_features, width] fp32 of synthetic rows; None for real ones."""

    def disk_bytes(self) -> int: ...


@runtime_checkable
class TextRows(RowSource, Protocol):
    """Rows that say which place in a text each is of."""

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids of rows [start, stop), int32."""

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions in their contexts of rows [start, stop), int32."""

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Document ids of rows [start, stop), int32."""
