"""How much of a dictionary's FVU is that its codes are too small, as a penalty makes them?

    python benchmarks/shrinkage.py --cache cache/planted-1k runs/dynamics-50m runs/dynamics-constant

Held-out rows of a cache with one site. With x about b_dec: `larger by` is the one factor that brings all
reconstructions closest, <x, x_hat> / <x_hat, x_hat>, less 1; `FVU at that` is what is left then. (The inverse factor is
gamma, the relative reconstruction bias of Rajamanoharan et al. 2024, arXiv 2404.16014, there about 0.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import sparsepilot
from sparsepilot.data.cache import Cache
from sparsepilot.interop.dictionary import Dictionary

BATCH = 1024


@torch.no_grad()
def shrinkage(sae: Dictionary, x_BD: Tensor, mean_D: Tensor) -> dict[str, float]:
    """L0, FVU about the mean of the training rows, the factor, and FVU with all reconstructions times that."""
    active = own = cross = total = left = 0.0
    for part_BD in x_BD.split(BATCH):
        codes_BF = sae.encode(part_BD)
        y_BD, y_hat_BD = (z_BD.double() - sae.b_dec.double() for z_BD in (part_BD, sae.decode(codes_BF)))
        active += float((codes_BF > 0).sum())
        own += float((y_hat_BD * y_hat_BD).sum())
        cross += float((y_BD * y_hat_BD).sum())
        left += float(((y_BD - y_hat_BD) ** 2).sum())
        total += float(((part_BD - mean_D).double() ** 2).sum())
    factor = cross / own
    # ||y - f y_hat||^2 = ||y - y_hat||^2 - (f - 1)^2 ||y_hat||^2 at the best f
    at_factor = left - (factor - 1) ** 2 * own
    return {"l0": active / len(x_BD), "fvu": left / total, "factor": factor, "fvu_at_factor": at_factor / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", type=Path, nargs="+")
    parser.add_argument("--cache", type=Path, required=True)
    args = parser.parse_args()
    cache = Cache(args.cache)
    (site,) = cache.widths
    x_BD = cache.read(site, cache.num_train_rows, cache.num_train_rows + cache.num_val_rows).float()
    print("| run | L0 | FVU | codes want to be larger by | FVU at that |", "|---|---|---|---|---|", sep="\n")
    for run_dir in args.run_dirs:
        found = shrinkage(sparsepilot.load(run_dir), x_BD, cache.stats(site).mean_D)
        print(
            f"| {run_dir.name} | {found['l0']:.3f} | {found['fvu']:.4f} | {found['factor'] - 1:.1%} "
            f"| {found['fvu_at_factor']:.4f} |"
        )


if __name__ == "__main__":
    main()
