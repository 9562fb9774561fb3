"""What the architectures with a sparsity penalty share: a coefficient as their knob, and pairs above a bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.step import Dense, Knob, Moment, Selection
from sparsepilot.ops.active import ActiveSet
from sparsepilot.ops.product import EncoderProduct
from sparsepilot.ops.select import density_above, select_above

LARGEST_COEFFICIENT = 1e8


class Penalised(Autoencoder):
    """Touches the pairs whose pre-activation is above `bounds()`; everything below gives and takes no gradient."""

    coefficient: float
    slew_nats_per_lr = 150.0  # measured with a coefficient of 1e6: 130 to 270 (docs/log.md, 2026-11-22)

    @property
    def knob(self) -> Knob:
        return Knob("penalty", initial=self.coefficient, low=0.0, high=LARGEST_COEFFICIENT)

    def bounds(self, now: Moment) -> Tensor | None:
        """[F] pre-activations below which a pair can be left out; None: 0 for all."""
        return None

    def select(self, product: Callable[..., EncoderProduct], now: Moment) -> Selection | Dense:
        bounds_F = self.bounds(now)
        tiles = product() if bounds_F is None else product(-bounds_F)
        if density_above(tiles, 0.0, self.shard) > self.dense_above:
            return Dense()
        pairs = select_above(tiles, 0.0)
        pre_P = pairs.values_P if bounds_F is None else pairs.values_P + bounds_F[pairs.ids_P]
        active = ActiveSet.from_pairs(pairs.rows_P, pairs.ids_P, tiles.num_rows, tiles.num_latents)
        return Selection(active, pre_P)

    def keep(self, pre_BF: Tensor, dense: Dense, now: Moment) -> tuple[Tensor | None, Tensor | None]:
        return None, None  # `respond` gives 0 below the bound

    @torch.no_grad()
    def shrink_decoder_(self, norm: float) -> None:
        """Starts with short decoder rows and the tied encoder: few latents fire by much before anything is learned."""
        self.W_dec.mul_(norm)
        self.W_enc.mul_(norm)
