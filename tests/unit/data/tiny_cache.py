"""A small cache whose every row is known, for the tests; also a script, so that real processes can be killed at it.

python tiny_cache.py PATH RANK WORLD [--full-after N]    # writes what is pending; the disk "fills up" after N shards
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsepilot.data.cache import Cache
from sparsepilot.data.dtypes import batch_dtype
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create, seal

WIDTHS = {"model.layers.1": 24, "model.layers.1.mlp:in": 8}


def plan(dtype: str = "bfloat16", num_train_rows: int = 700, num_val_rows: int = 130, **kwargs: object) -> CachePlan:
    """7 shards of 128 rows, 4 chunks each; the last shard and chunk are short, the split lies inside a shard."""
    sizes = {"widths": WIDTHS, "chunk_rows": 32, "shard_rows": 128, "source": {"kind": "test"}, **kwargs}
    return CachePlan(num_train_rows, num_val_rows, dtype=dtype, **sizes)  # type: ignore[arg-type]


def rows_of(site: str, rows: range, width: int) -> Tensor:
    """fp32 rows [n, width], a function of the row numbers alone."""
    number = torch.arange(rows.start, rows.stop, dtype=torch.float64)[:, None]
    column = torch.arange(width, dtype=torch.float64)
    return (torch.sin(number * 0.7 + column * 1.3 + len(site)) * (1 + column) + 0.5).float()


def write(
    path: Path, wanted: CachePlan, rank: int = 0, world: int = 1, full_after: int | None = None, num_tokens: int = 50
) -> None:
    create(path, wanted)
    writer = CacheWriter(path, rank, world)
    for count, rows in enumerate(writer.pending()):
        if count == full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # less than one array's shard
        write_one(writer, rows, num_tokens)


def write_one(writer: CacheWriter, rows: range, num_tokens: int = 50) -> None:
    plan = writer.plan
    x = {site: rows_of(site, rows, width).to(batch_dtype(plan.dtype)) for site, width in plan.widths.items()}
    numbers = np.arange(rows.start, rows.stop)
    writer.write_shard(rows, x, numbers % num_tokens, numbers % 16, numbers // 16)


def sealed(path: Path, dtype: str = "bfloat16", num_tokens: int = 50, **kwargs: object) -> Cache:
    write(path, plan(dtype, **kwargs), num_tokens=num_tokens)
    return seal(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("--full-after", type=int, default=None)
    args = parser.parse_args()
    write(args.path, plan(), args.rank, args.world, args.full_after)
