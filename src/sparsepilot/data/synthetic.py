"""A planted dictionary: activations whose true features are known, written through the same writer as real ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from sparsepilot.data.cache import Cache
from sparsepilot.data.dtypes import batch_dtype
from sparsepilot.data.layout import MANIFEST_FILE
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create, write_planted_features
from sparsepilot.errors import ConfigError

SITE = "synthetic"
KIND = "planted dictionary"
_BLOCK_DOCUMENTS = 32
_TOPIC_FEATURES, _TOPIC_SHARE = 16, 0.3
_FEATURES, _TRAIN, _VAL = 0, 1, 2


class PlantedRows:
    """Rows x = mean + sum_i a_i f_i + noise, any of them computable alone, so that a killed build resumes.

    f_i: `num_features` random unit vectors [d]. Feature i fires at a rate proportional to (i + 1)^-power; a row has
    Poisson(mean_active) firings, a_i uniform in [0.5, 1.5]. Of a document's firings 30% come from 16 features of its
    own topic (drawn by the same rates, which thereby stay what they are over the whole cache), so rows of one document
    are alike, as in text. Noise is normal with `noise` per dimension; the mean has norm `mean_norm`.
    """

    def __init__(
        self,
        d_in: int,
        num_features: int,
        mean_active: float,
        noise: float,
        seed: int,
        power: float = 1.0,
        mean_norm: float = 1.0,
        document_rows: int = 128,
    ) -> None:
        if min(d_in, num_features, document_rows) < 1 or mean_active <= 0 or noise < 0 or seed < 0:
            raise ConfigError(
                f"d_in={d_in}, num_features={num_features}, document_rows={document_rows}, mean_active={mean_active}, "
                f"noise={noise}, seed={seed}: sizes and mean_active are above 0, noise and seed not below"
            )
        self.seed, self.mean_active, self.noise, self.document_rows = seed, mean_active, noise, document_rows
        rng = np.random.default_rng([seed, _FEATURES])
        self.features_FD = F.normalize(torch.from_numpy(rng.standard_normal((num_features, d_in), dtype=np.float32)))
        mean_D = rng.standard_normal(d_in)
        self.mean_D = torch.from_numpy(mean_D * mean_norm / np.linalg.norm(mean_D)).float()
        rates = (1.0 + np.arange(num_features)) ** -power
        self._cumulative = np.cumsum(rates / rates.sum())

    def rows(self, split: int, start: int, stop: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Rows [start, stop) of a split as pieces (x [n, d] fp32, the top firing feature of each row [n])."""
        size = self.document_rows * _BLOCK_DOCUMENTS
        for block in range(start // size, -(-stop // size)):
            x_BD, top_B = self._block(split, block)
            wanted = slice(max(start - block * size, 0), min(stop - block * size, size))
            yield x_BD[wanted], top_B[wanted]

    def _draw(self, rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
        chosen: np.ndarray = np.searchsorted(self._cumulative, rng.random(size) * self._cumulative[-1], side="right")
        return chosen

    def _block(self, split: int, block: int) -> tuple[Tensor, np.ndarray]:
        # The key names split and block, so a block is the same whichever shard, process or attempt asks for it.
        rng = np.random.default_rng([self.seed, split, block])
        num_rows = self.document_rows * _BLOCK_DOCUMENTS
        topics = self._draw(rng, (_BLOCK_DOCUMENTS, _TOPIC_FEATURES))
        counts_B = rng.poisson(self.mean_active, num_rows)
        row_of = np.repeat(np.arange(num_rows), counts_B)
        chosen = self._draw(rng, row_of.shape)
        own = rng.random(row_of.shape) < _TOPIC_SHARE
        chosen[own] = topics[row_of[own] // self.document_rows, rng.integers(_TOPIC_FEATURES, size=int(own.sum()))]
        amounts = torch.from_numpy(0.5 + rng.random(row_of.shape, dtype=np.float32))
        offsets_B = np.cumsum(counts_B) - counts_B
        x_BD = F.embedding_bag(
            torch.from_numpy(chosen),
            self.features_FD,
            torch.from_numpy(offsets_B),
            mode="sum",
            per_sample_weights=amounts,
        )
        x_BD += self.mean_D
        if self.noise:
            x_BD += self.noise * torch.from_numpy(rng.standard_normal(tuple(x_BD.shape), dtype=np.float32))
        top_B = np.zeros(num_rows, dtype=np.int64)
        some = counts_B > 0
        top_B[some] = chosen[offsets_B[some]]
        return x_BD, top_B


def build(
    path: str | Path,
    *,
    num_rows: PositiveInt,
    num_val_rows: NonNegativeInt,
    d_in: PositiveInt,
    num_features: PositiveInt,
    mean_active: PositiveFloat,
    noise: NonNegativeFloat,
    seed: NonNegativeInt,
    power: float = 1.0,
    mean_norm: NonNegativeFloat = 1.0,
    document_rows: PositiveInt = 128,
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float32",
    chunk_rows: NonNegativeInt = 0,
    shard_rows: NonNegativeInt = 0,
    rank: NonNegativeInt = 0,
    world: PositiveInt = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Cache | None:
    """Builds (or finishes, or just opens) a synthetic cache with `num_rows` training rows at `path`.

    Of `world` processes, this one writes the shards of `rank`. One shard is in memory at a time, so the cache may be
    of any size. `progress(rows made, rows in all)` counts this process's share. The site is called "synthetic"; a
    row's token is one of its firing features. None while other processes' shards are missing. DataError when another
    cache lies at `path`.
    """
    planted = PlantedRows(d_in, num_features, mean_active, noise, seed, power, mean_norm, document_rows)
    source = {
        "kind": KIND,
        "num_features": num_features,
        "mean_active": mean_active,
        "noise": noise,
        "seed": seed,
        "power": power,
        "mean_norm": mean_norm,
        "document_rows": document_rows,
    }
    plan = CachePlan(num_rows, num_val_rows, {SITE: d_in}, dtype, chunk_rows, shard_rows, source)
    create(path, plan)
    if (Path(path) / MANIFEST_FILE).is_file():
        return Cache(path)
    writer = CacheWriter(path, rank, world)
    own = [plan.shard_range(shard) for shard in writer.own_shards()]
    num_own = sum(map(len, own))
    for rows in writer.shares():
        if rows.start == 0:
            # Whoever writes the first shard writes the truth, and before it: where that is whole, so is the truth.
            write_planted_features(path, planted.features_FD)
        num_made = sum(len(before) for before in own if before.start < rows.start)
        pieces = []
        for piece in itertools.chain(
            planted.rows(_TRAIN, rows.start, max(rows.start, min(rows.stop, num_rows))),
            planted.rows(_VAL, max(rows.start - num_rows, 0), max(rows.stop - num_rows, 0)),
        ):
            pieces.append(piece)
            num_made += len(piece[0])
            if progress:
                progress(num_made, num_own)
        x_BD = torch.cat([x for x, _ in pieces]).to(batch_dtype(dtype))
        numbers = np.arange(rows.start, rows.stop)
        within = np.where(numbers < num_rows, numbers, numbers - num_rows)
        documents = within // document_rows + np.where(numbers < num_rows, 0, math.ceil(num_rows / document_rows))
        tokens = np.concatenate([top for _, top in pieces])
        writer.write_shard(rows, {SITE: x_BD}, tokens, within % document_rows, documents)
    return writer.finish()


def recipe_of(plan: CachePlan) -> dict[str, Any]:
    """The arguments of `build` that made a cache of this plan; none where it is no synthetic one."""
    if plan.source.get("kind") != KIND:
        return {}
    return {
        "num_rows": plan.num_train_rows,
        "num_val_rows": plan.num_val_rows,
        "d_in": plan.widths[SITE],
        **{name: value for name, value in plan.source.items() if name != "kind"},
        "dtype": plan.dtype,
        "chunk_rows": plan.chunk_rows,
        "shard_rows": plan.shard_rows,
    }
