"""The data side of a run: deals out loaders over a cache or other rows, and guards the position on resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning import LightningDataModule
from pydantic import PositiveInt

from sparsepilot.data.loader import TrainLoader, ValLoader, streams_of_rank
from sparsepilot.data.order import Order
from sparsepilot.data.sites import expand_sites
from sparsepilot.data.source import RowSource
from sparsepilot.data.together import known_sites, open_sites
from sparsepilot.data.window import window_rows_per_stream
from sparsepilot.errors import CheckpointError, ConfigError


class RunData(LightningDataModule):
    """Deals out the loaders of a run over any rows.

    Args:
        cache: where the rows come from.
        sites: read side by side; `d_in` is their width.
        order: of the training rows.
        prefetch_batches: read ahead.
        val_batch: rows per validation batch on each rank.
        val_rows: validation rows that are read; None: all.
        batch, accumulate, total_samples: of the run.

    `start_sample` may be set until `train_dataloader()` is called. Raises ConfigError on a batch that does not divide.
    """

    def __init__(
        self,
        cache: RowSource,
        sites: Sequence[str],
        order: Order,
        prefetch_batches: int,
        val_batch: int,
        val_rows: int | None,
        *,
        batch: int,
        accumulate: int,
        total_samples: int,
    ) -> None:
        super().__init__()
        self.cache, self.sites, self.order = cache, list(sites), order
        self.d_in = sum(cache.widths[site] for site in sites)
        self.num_streams, self.seed = order.num_streams, order.seed
        self.prefetch_batches, self.val_batch, self.val_rows = prefetch_batches, val_batch, val_rows
        self.batch, self.accumulate, self.total_samples = batch, accumulate, total_samples
        self.start_sample = 0
        self._loader(0, 1)  # refuses a batch that does not divide before anything is built

    def record(self) -> None:
        """Called once, by the rank that writes, when the run folder is there: keeps what a resume will need."""

    def train_dataloader(self) -> TrainLoader:
        """This rank's micro-batches from `start_sample` to the end of the run."""
        return self._loader(*self._rank_and_world())

    def val_dataloader(self) -> ValLoader | list[Any]:
        """This rank's validation rows; no loader where the cache has no such rows."""
        rank, world = self._rank_and_world()
        if self.cache.num_val_rows == 0:
            return []
        return ValLoader(self.cache, self.sites, self.val_batch, self.val_rows, rank, world, self.prefetch_batches)

    def state_dict(self) -> dict[str, Any]:
        """Rank-free: where the run is on the sample clock, and what the order of rows hangs on."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        samples = self.start_sample if module is None else cast(int, module.samples)
        return {"samples": samples, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` stood; CheckpointError, naming the field, when that was another order of rows."""
        for name, here in self._identity().items():
            if state_dict.get(name) != here:
                raise CheckpointError(
                    f"data.{name} is {here!r} and was {state_dict.get(name)!r} in the checkpoint; the order of rows "
                    "hangs on it: restore it, or start over with resume=never"
                )
        self.order.per_stream(state_dict["samples"], "samples")
        self.start_sample = int(state_dict["samples"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_streams": self.num_streams,
            "window_rows_per_stream": self.order.window_rows_per_stream,
            "fingerprint": self.cache.fingerprint,
        }

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        streams_of_rank(self.num_streams, self.trainer.global_rank, self.trainer.world_size)
        return self.trainer.global_rank, self.trainer.world_size

    def _loader(self, rank: int, world: int) -> TrainLoader:
        return TrainLoader(
            self.cache,
            self.sites,
            self.order,
            self.batch,
            self.accumulate,
            self.total_samples,
            self.start_sample,
            rank,
            world,
            self.prefetch_batches,
        )


class ActivationData(RunData):
    """Rows of a sealed activation cache, or of several that hold the same rows (`Caches`), their sites side by side.

    `sites` are names or globs (see `data.sites`); the attribute of that name lists what they stand for in this cache.
    `window_mb` is the shuffle window of all streams over all ranks, in MiB of stored rows.

    Raises DataError (cache, sites) and ConfigError (sizes) on construction.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        sites: Sequence[str],
        num_streams: PositiveInt = 64,
        window_mb: PositiveInt = 1024,
        prefetch_batches: PositiveInt = 4,
        val_batch: PositiveInt = 4096,
        val_rows: PositiveInt | None = None,
        *,
        batch: int,
        accumulate: int,
        total_samples: int,
        seed: int,
    ) -> None:
        check_names(sites)
        names = expand_sites(sites, known_sites(path), str(path))
        cache = open_sites(path, names)
        window = window_rows_per_stream(window_mb, num_streams, sum(map(cache.row_bytes, names)))
        order = Order(cache.num_train_rows, cache.chunk_rows, num_streams, window, seed)
        super().__init__(
            cache, names, order, prefetch_batches, val_batch, val_rows,
            batch=batch, accumulate=accumulate, total_samples=total_samples,
        )  # fmt: skip


def check_names(sites: Sequence[str]) -> None:
    """ConfigError where no site is named, or one twice."""
    if not sites:
        raise ConfigError("sites=[] names nothing to read; name at least one site of the cache")
    if len(set(sites)) < len(sites):
        raise ConfigError(f"sites={list(sites)} names a site twice")
