"""Writes an activation cache, or this process's share: python scripts/cache_activations.py data=demo [rank=0 world=4]

Processes share nothing but the folder; each resumes where it was, and the last one to finish seals the cache. In a
Slurm array, rank and world come from the array.
"""

from __future__ import annotations

import os

import hydra
from omegaconf import DictConfig

from sparsepilot.config.cli import run, user_errors


@hydra.main(version_base="1.3", config_path="../conf", config_name="cache")
def main(cfg: DictConfig) -> None:
    with user_errors():
        from sparsepilot.caching import array_rank, build_cache
        from sparsepilot.config.check import check_cache

        plain = check_cache(cfg)
        rank, world = array_rank(cfg.rank, cfg.world, os.environ)
        cache = build_cache(plain["data"], plain["lm"], plain["text"], rank=rank, world=world)
        if cache is None:
            print(f"rank {rank} of {world} is done; the cache is sealed when the others are")
            return
        print(
            f"{cache.path}: {cache.num_train_rows:,} training and {cache.num_val_rows:,} validation rows of "
            f"{', '.join(f'{site} ({width})' for site, width in cache.widths.items())}, "
            f"{cache.disk_bytes() / 2**20:,.0f} MiB"
        )


if __name__ == "__main__":
    run(main, ranks_alike=True)
