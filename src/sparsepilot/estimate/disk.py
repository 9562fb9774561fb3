"""Bytes on disk: a cache that may not be there yet, checkpoints, the trained dictionary."""

from __future__ import annotations

from collections.abc import Mapping

from sparsepilot.data.dtypes import STORED
from sparsepilot.data.layout import array_specs
from sparsepilot.data.plan import CachePlan

CRC_BYTES = 4
"""After each chunk, and after each shard's index."""
INDEX_BYTES = 16
"""Of a shard's index per chunk, whether the chunk is there or not: offset and length."""
MARKER_NUMBER_BYTES = 2 * 20
"""Of a shard's marker per column of a site: a sum and a sum of squares in decimal digits."""
MARKER_ARRAY_BYTES = 150
"""Of a shard's marker per array: name, checksum, size."""
STATISTICS_BYTES = 4 * 22
"""Of manifest and attributes together per column of a site: sum, sum of squares, mean, variance in decimal digits."""
METADATA_BYTES = 1500
"""Of one array: zarr.json; and about as much once for plan, manifest and group."""
CHECKPOINT_BYTES = 64 * 1024
"""Of a checkpoint beside its tensors: names, counters, zip records; 20 to 60 KiB were seen."""


def shard_bytes(rows: int, row_bytes: int, chunk_rows: int, chunks_per_shard: int) -> int:
    """One array's file of one shard that holds `rows` rows: whole chunks, each with its checksum, and the index.

    >>> shard_bytes(rows=1000, row_bytes=8, chunk_rows=256, chunks_per_shard=8)    # four chunks, the last one filled up
    8340
    """
    chunks = -(-rows // chunk_rows)
    return chunks * (chunk_rows * row_bytes + CRC_BYTES) + chunks_per_shard * INDEX_BYTES + CRC_BYTES


def cache_bytes(plan: CachePlan) -> int:
    """All files of a sealed cache: rows x widths x dtype, the labels of rows, checksums, indices, markers, manifest.

    >>> rows = 1_000_000
    >>> size = cache_bytes(CachePlan(rows, 0, {"model.layers.9": 576}, "bfloat16"))
    >>> round(size / (rows * (576 * 2 + 3 * 4)), 3)     # beside the numbers themselves
    1.001
    """
    per_shard = plan.shard_rows // plan.chunk_rows
    columns = sum(plan.widths.values())
    specs = array_specs(plan)
    total = 0
    for name, spec in specs.items():
        item = STORED[plan.dtype].torch_dtype.itemsize if name.startswith("activations/") else 4
        row = item * (spec.width or 1)
        total += sum(
            count * shard_bytes(rows, row, plan.chunk_rows, per_shard) for rows, count in _shards(plan).items() if rows
        )
    markers = plan.num_shards * (columns * MARKER_NUMBER_BYTES + len(specs) * MARKER_ARRAY_BYTES)
    return total + markers + columns * STATISTICS_BYTES + (len(specs) + 1) * METADATA_BYTES


def _shards(plan: CachePlan) -> Mapping[int, int]:
    """Rows of a shard -> how many shards have so many."""
    whole, rest = divmod(plan.num_rows, plan.shard_rows)
    return {plan.shard_rows: whole, rest: 1}


def checkpoint_bytes(numbers: int, buffer_bytes: int) -> int:
    """One checkpoint: parameters and optimizer state (`numbers`, fp32) and the buffers that are saved.

    >>> checkpoint_bytes(3 * 10**6, 0) / 2**20 < 11.6
    True
    """
    return 4 * numbers + buffer_bytes + CHECKPOINT_BYTES


def checkpoints_bytes(each: int, keep_last: int, keep_best: int) -> int:
    """The folder of checkpoints at its fullest: those that are kept, and the one being written.

    >>> checkpoints_bytes(100, keep_last=2, keep_best=1)
    400
    """
    return each * (keep_last + keep_best + 1)
