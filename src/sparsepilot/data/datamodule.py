"""The data side of a run: opens the cache, deals out loaders, and guards the position on resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning import LightningDataModule
from pydantic import PositiveInt

from sparsepilot.data.loader import TrainLoader, ValLoader, streams_of_rank
from sparsepilot.data.order import Order
from sparsepilot.data.sites import expand_sites
from sparsepilot.data.together import known_sites, open_sites
from sparsepilot.data.window import window_rows_per_stream
from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.parallel.collectives import num_ranks, rank


class ActivationData(LightningDataModule):
    """Rows of a sealed activation cache, or of several that hold the same rows (`Caches`), their sites side by side.

    `sites` are names or globs (see `data.sites`); the attribute of that name lists what they stand for in this cache.
    `window_mb` is the shuffle window of all streams over all ranks, in MiB of stored rows. `start_sample` may be set
    until `train_dataloader()` is called.

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
        super().__init__()
        if not sites:
            raise ConfigError("sites=[] names nothing to read; name at least one site of the cache")
        if len(set(sites)) < len(sites):
            raise ConfigError(f"sites={list(sites)} names a site twice")
        self.sites = expand_sites(sites, known_sites(path), str(path))
        self.cache = open_sites(path, self.sites)
        self.d_in = sum(self.cache.widths[site] for site in self.sites)
        self.num_streams, self.seed = num_streams, seed
        self.prefetch_batches, self.val_batch, self.val_rows = prefetch_batches, val_batch, val_rows
        self.batch, self.accumulate, self.total_samples = batch, accumulate, total_samples
        window = window_rows_per_stream(window_mb, num_streams, sum(map(self.cache.row_bytes, self.sites)))
        self.order = Order(self.cache.num_train_rows, self.cache.chunk_rows, num_streams, window, seed)
        self.start_sample = 0
        self._loader(0, 1)  # refuses a batch that does not divide before anything is built

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
        """Among the ranks that read different rows."""
        if self.trainer is None:
            return 0, 1
        streams_of_rank(self.num_streams, rank(), num_ranks())
        return rank(), num_ranks()

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
