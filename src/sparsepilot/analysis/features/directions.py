"""What decoder directions say by themselves: the tokens that they promote, and which of them are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.ops.topk import topk_grouped

_TILE_BYTES = 2**26


class Best(NamedTuple):
    """The largest of each row, the largest first."""

    values_FN: Tensor
    ids_FN: Tensor


class Lens(NamedTuple):
    promotes: Best
    suppresses: Best
    """Its values are negative, the most negative first."""


Advance = Callable[[int], None]


def logit_lens(directions_FD: Tensor, unembedding_VD: Tensor, n: int, advance: Advance) -> Lens:
    """The n tokens whose logits each direction raises and lowers most.

    Args:
        directions_FD: [F, D] decoder rows; their norm scales the values.
        unembedding_VD: [V, D] with the final norm folded in (`source.unembedding`).
        advance: told of so many latents done, now and then.
    """
    up, down = [], []
    for rows in _tiles(len(directions_FD), len(unembedding_VD)):
        logits_BV = directions_FD[rows] @ unembedding_VD.T
        up.append(_largest(logits_BV, n))
        down.append(_largest(logits_BV.neg_(), n))
        advance(len(logits_BV))
    lowest = _joined(down)
    return Lens(_joined(up), Best(-lowest.values_FN, lowest.ids_FN))


def nearest(directions_FD: Tensor, n: int, advance: Advance) -> Best:
    """The n latents of the largest decoder cosine with each, itself left out; n is less where there are not so many."""
    unit_FD = directions_FD / torch.linalg.vector_norm(directions_FD, dim=1, keepdim=True).clamp_min(1e-12)
    found = []
    for rows in _tiles(len(unit_FD), len(unit_FD)):
        cosines_BF = unit_FD[rows] @ unit_FD.T
        cosines_BF[torch.arange(rows.stop - rows.start), torch.arange(rows.start, rows.stop)] = -2
        found.append(_largest(cosines_BF, min(n, len(unit_FD) - 1)))
        advance(rows.stop - rows.start)
    return _joined(found)


def residual_directions(sae: Dictionary, width: int) -> Tensor | None:
    """[F, width] what each latent writes into the last site of that width; None where no site has it."""
    sites = sae.cfg.get("sites_out") or sae.cfg.get("sites") or [""]
    each, rest = divmod(sae.cfg["d_out"], len(sites))
    return sae.W_dec.detach()[:, -width:].contiguous() if each == width and rest == 0 else None


def _tiles(num_rows: int, width: int) -> Iterator[slice]:
    rows = max(16, _TILE_BYTES // (4 * width))
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def _largest(values_BN: Tensor, n: int) -> Best:
    top = topk_grouped(values_BN, n)
    order_BK = top.values_BK.argsort(dim=1, descending=True, stable=True)
    return Best(top.values_BK.gather(1, order_BK), top.ids_BK.gather(1, order_BK))


def _joined(parts: list[Best]) -> Best:
    return Best(torch.cat([p.values_FN for p in parts]), torch.cat([p.ids_FN for p in parts]))
