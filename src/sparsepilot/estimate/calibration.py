"""Timed real steps of smaller sizes on this machine, and what they say of larger ones."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor

from sparsepilot.estimate.dry import BareSteps
from sparsepilot.estimate.speed import Corner
from sparsepilot.ops.select import SPARE_CERTAIN
from sparsepilot.ops.topk import GROUP_SIZE

MOST_ROWS, MOST_LATENTS = 8192, 32768
"""The larger corner is at most this large, so that a calibration stays short; it is half of what is asked for."""
FEWEST_ROWS, FEWEST_LATENTS = 64, 256
UNIT_LATENTS = GROUP_SIZE
SPAN = 4
"""From the smaller to the larger corner."""
ROWS_FOR_L0 = 256


def corner_sizes(
    rows: int, latents: int, fewest_latents: int = FEWEST_LATENTS, unit_latents: int = UNIT_LATENTS
) -> list[tuple[int, int]]:
    """(rows, latents) of the four corners: an eighth and half of what is asked for, or less; more only where fewer
    latents would be another kind of step. (Corners that lie apart make less of their noise: 2% of it on each is 6% of
    what is told from them, and 12% with a quarter and half.)

    Args:
        rows, latents: asked for.
        fewest_latents: with fewer, a step would run dense, or select in another way.
        unit_latents: what their number must be a multiple of.

    >>> corner_sizes(4096, 16384)
    [(512, 2048), (512, 8192), (2048, 2048), (2048, 8192)]
    >>> corner_sizes(1024, 2048, fewest_latents=1500)
    [(128, 1504), (128, 6016), (512, 1504), (512, 6016)]
    """
    few = max(FEWEST_ROWS, min(MOST_ROWS // SPAN, rows // 8))
    fewest = -(-max(fewest_latents, min(MOST_LATENTS // SPAN, latents // 8)) // unit_latents) * unit_latents
    return [(b, f) for b in (few, SPAN * few) for f in (fewest, SPAN * fewest)]


def fewest_latents(pairs_per_row: float, dense_above: float) -> int:
    """With fewer latents a step of so many active pairs per row would run dense, or select without groups.

    >>> fewest_latents(32, 1 / 24)
    1229
    """
    return math.ceil(1.2 * max(pairs_per_row / dense_above, GROUP_SIZE * (pairs_per_row + SPARE_CERTAIN)))


class Calibration:
    """The corners of a configuration, ready to be timed in turn.

    Args:
        cfg: the configuration asked for; its step is never run.
        widths: of each site.
        rows: of a micro-batch on one rank.
        l0: thresholds are moved until about so many latents are active; None: as at the start of a run.
        device: where to run.
        x_BD: rows of the data where they are there; None: random ones.
        fewest: latents, see `fewest_latents`.
    """

    def __init__(
        self,
        cfg: DictConfig,
        widths: Mapping[str, int],
        rows: int,
        l0: float | None = None,
        device: str = "cpu",
        x_BD: Tensor | None = None,
        fewest: int = FEWEST_LATENTS,
    ) -> None:
        self._device = device
        self.steps: dict[tuple[int, int], BareSteps] = {}
        self.seconds: dict[tuple[int, int], list[float]] = {}
        for b, f in corner_sizes(rows, int(cfg.model.d_sae), fewest, UNIT_LATENTS * _readers(cfg)):
            small = cfg.copy()
            small.batch, small.accumulate = b, 1
            small.model.d_sae = f
            small.samples = max(int(cfg.samples), b)
            self.steps[b, f] = BareSteps(small, widths, device, x_BD)
            self.seconds[b, f] = []
            if l0 is not None:
                reach_l0(self.steps[b, f], l0)

    def round(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """One step of each corner, timed."""
        for size, step in self.steps.items():
            self._wait()
            began_s = clock()
            step()
            self._wait()
            self.seconds[size].append(clock() - began_s)

    def corners(self, warmup: int = 1) -> list[Corner]:
        """The median of each corner's steps after the first `warmup`."""
        return [Corner(b, f, statistics.median(times[warmup:])) for (b, f), times in self.seconds.items()]

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def _readers(cfg: DictConfig) -> int:
    """What d_sae must be a multiple of: the layers that share the latents of a cross-layer transcoder."""
    sites = cfg.model.get("sites")
    return len(sites["read"]) if sites is not None and "read" in sites and sites.get("cross_layer") else 1


@torch.no_grad()
def reach_l0(steps: BareSteps, l0: float) -> None:
    """Moves all thresholds of penalised dictionaries by one number until about `l0` latents of a row are active.

    The latents that fire are then those that answer most, as in a trained dictionary, but nothing is trained: which
    rows and latents meet is not as later.
    """
    for _, trainee in steps.module.each():
        sae = trainee.autoencoder
        if sae.knob.kind != "penalty":
            continue
        x_BD = trainee.scaled(steps.x_BD[:ROWS_FOR_L0])[0]
        tensors = [tensor for tensor in (*sae.parameters(), *sae.buffers()) if tensor.ndim < 2]
        before = [tensor.clone() for tensor in tensors]
        low, high = -1e3, 1e3
        for _ in range(40):
            middle = (low + high) / 2
            sae.shift_thresholds_(middle)
            active = float((sae.encode(x_BD) != 0).sum(dim=1).double().mean())
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            low, high = (middle, high) if active > l0 else (low, middle)
        sae.shift_thresholds_(high)
