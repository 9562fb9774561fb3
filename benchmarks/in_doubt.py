"""How many rows the bfloat16 selection of TopK leaves in doubt on a trained dictionary, and whether it is exact.

    python benchmarks/in_doubt.py run_dir

Reads the newest checkpoint of a TopK run and the validation rows of its cache. For several numbers of spare candidates:
the share of rows whose k largest are not certain from the candidates alone (they are computed again in fp32), the share
of rows whose set, without that second look, is not the fp32 one, and the share after it. Sets are compared by their
values: equal ones within fp32 rounding are the same set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from omegaconf import OmegaConf

from sparsepilot.callbacks.checkpoint_io import list_checkpoints
from sparsepilot.data.cache import Cache
from sparsepilot.ops import select
from sparsepilot.ops.product import EncoderProduct, Workspace

ROWS = 8192


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    args = parser.parse_args()
    cfg = OmegaConf.load(args.run_dir / "config.yaml")
    state = torch.load(list_checkpoints(args.run_dir / "checkpoints")[0][1], weights_only=True)["state_dict"]
    W_enc_FD, b_enc_F, b_dec_D = (state[f"trainees.sae.autoencoder.{name}"] for name in ("W_enc", "b_enc", "b_dec"))
    site, k = cfg.data.sites[0], int(cfg.model.k)
    cache = Cache(cfg.data.path, [site])
    stats = cache.stats(site)
    first = cache.num_train_rows
    x_BD = cache.read(site, first, min(first + ROWS, first + cache.num_val_rows)).float()
    xc_BD = x_BD * (x_BD.shape[1] / stats.mean_sq_norm) ** 0.5 - b_dec_D

    def product(half: torch.dtype | None, certain: bool = True) -> EncoderProduct:
        return EncoderProduct(xc_BD, W_enc_FD, b_enc_F, Workspace(), half=half, certain=certain)

    wanted_BK = select.select_topk(product(None), k).values_BK.sort(dim=1).values

    def wrong(half_certain: bool) -> float:
        values_BK = select.select_topk(product(torch.bfloat16, half_certain), k).values_BK.sort(dim=1).values
        close_BK = (values_BK - wanted_BK).abs() <= 1e-5 * (1 + wanted_BK.abs())
        return float((~close_BK.all(dim=1)).double().mean())

    norm = float(W_enc_FD.norm(dim=1).mean())
    print(f"{len(xc_BD):,} rows, d_sae {len(W_enc_FD):,}, k {k}, mean norm of encoder rows {norm:.2f}")
    print("| spare | rows in doubt | wrong without a second look | wrong |")
    print("|---|---|---|---|")
    for spare in (0, 8, 16, 32, 64):
        select.SPARE = select.SPARE_CERTAIN = spare
        tiles = product(torch.bfloat16)
        doubts = sum(select._topk_by_bounds(tiles, rows, k)[1].numel() for rows in tiles.row_tiles())
        print(f"| {spare} | {doubts / len(xc_BD):.2%} | {wrong(False):.2%} | {wrong(True):.2%} |")


if __name__ == "__main__":
    main()
