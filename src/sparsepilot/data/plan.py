"""What a cache is going to be, decided before its first row: the only thing that several writers must agree on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from sparsepilot.data.dtypes import STORED, row_bytes
from sparsepilot.errors import ConfigError, nearest

CHUNK_BYTES = 256 * 1024
"""Aim for one chunk: small chunks mix better (order.py has the formula) and cost the shuffled loader little."""
MAX_CHUNK_BYTES = 2**30
SHARD_BYTES = 64 * 1024 * 1024
"""Aim for one shard over all sites: a writer holds one shard in memory."""


def default_chunk_rows(widths: dict[str, int], dtype: str) -> int:
    """The least power of two of rows, 16 to 4096, with which the widest site's chunk reaches `CHUNK_BYTES`."""
    widest = max(row_bytes(width, dtype) for width in widths.values())
    rows = 16
    while rows < 4096 and rows * widest < CHUNK_BYTES:
        rows *= 2
    return rows


def default_shard_rows(widths: dict[str, int], dtype: str, chunk_rows: int) -> int:
    """The power-of-two multiple of `chunk_rows` at which a shard of all sites reaches `SHARD_BYTES`."""
    total = sum(row_bytes(width, dtype) for width in widths.values())
    rows = chunk_rows
    while rows * total < SHARD_BYTES:
        rows *= 2
    return rows


@dataclass(frozen=True)
class CachePlan:
    """Shape and origin of a cache.

    Rows [0, num_train_rows) are training rows, the `num_val_rows` behind them validation rows of other documents.
    `chunk_rows` is the unit of checksums and of the shuffled order, `shard_rows` (a multiple of it) the unit of
    writing: one file per array; 0 picks a default by bytes. `dtype` is "float16", "bfloat16", "float32" or "int8"
    (a quarter of float32, with one fp32 scale per row). `source` is JSON: model id, revision, tokenizer, text ...

    Raises ConfigError on a value that no cache can have.
    """

    num_train_rows: int
    num_val_rows: int
    widths: dict[str, int]
    dtype: str
    chunk_rows: int = 0
    shard_rows: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise ConfigError(f"dtype={self.dtype!r} cannot be stored; {nearest(self.dtype, STORED)}")
        if not self.widths:
            raise ConfigError("widths={} names no site; a cache holds at least one")
        for site, width in self.widths.items():
            if width < 1:
                raise ConfigError(f"widths[{site!r}]={width}; a site is at least 1 wide")
            if not site or "/" in site or site.startswith(("__", ".")):
                raise ConfigError(f"site {site!r} cannot name an array: use a dotted module path without '/'")
        if self.num_train_rows < 1:
            raise ConfigError(f"num_train_rows={self.num_train_rows}; at least 1 is needed")
        if self.num_val_rows < 0:
            raise ConfigError(f"num_val_rows={self.num_val_rows}; 0 or more is needed")
        if self.chunk_rows == 0:
            object.__setattr__(self, "chunk_rows", default_chunk_rows(self.widths, self.dtype))
        if self.shard_rows == 0:
            object.__setattr__(self, "shard_rows", default_shard_rows(self.widths, self.dtype, self.chunk_rows))
        if self.chunk_rows < 1:
            raise ConfigError(f"chunk_rows={self.chunk_rows}; at least 1 is needed (0 picks one)")
        if self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ConfigError(f"shard_rows={self.shard_rows} is not a multiple of chunk_rows={self.chunk_rows}")
        largest = self.chunk_rows * max(row_bytes(width, self.dtype) for width in self.widths.values())
        if largest > MAX_CHUNK_BYTES:
            raise ConfigError(
                f"chunk_rows={self.chunk_rows} makes chunks of {largest} bytes; at most 1 GiB is possible"
            )
        try:
            # Through JSON once, so that a plan compares equal to its own copy from disk (tuples become lists).
            object.__setattr__(self, "source", json.loads(json.dumps(self.source, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"source={self.source!r} is not JSON ({error})") from error

    @property
    def num_rows(self) -> int:
        return self.num_train_rows + self.num_val_rows

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """The global rows of shard `shard`; the last one may be short."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
