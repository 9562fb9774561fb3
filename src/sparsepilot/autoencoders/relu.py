"""ReLU autoencoder with an L1 penalty or one of its relatives (Conerly et al., Transformer Circuits, April 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, Unpack

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from sparsepilot.autoencoders.base import Common
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.penalised import Penalised
from sparsepilot.autoencoders.step import Moment, Response


class ReLU(Penalised):
    """f(x) = ReLU(W_enc (x - b_in) + b_enc),  y_hat = W_dec^T f(x) + b_dec

    loss = ||y - y_hat||^2 + coefficient * sum_i penalty(u_i),  u_i = f_i ||W_dec[i]||

        l1    u
        tanh  tanh(steepness * u)       (Jermyn et al., Transformer Circuits, February 2024)
        log   log(1 + steepness * u)    (Riggs & Brinkmann 2024)
        p     u^p, p falling from 1     (p-annealing, Karvonen et al. 2024, arXiv 2408.00113): at each of `p_steps`
              steps of p the penalty is rescaled by S_before / S_after, S its mean over the last step's global
              batch, so that it keeps its size

    Decoder rows have any norm; the penalty sees through it, and they are exported at norm 1.

    Args:
        coefficient: of the penalty; the knob.
        penalty: which one.
        steepness: of tanh and log.
        decoder_norm: of decoder and encoder rows at the start.
        p_end: where p ends.
        p_steps: in so many equal steps, from `p_start_fraction` of the budget to its end.
    """

    architecture = "relu"
    unit_decoder = False
    penalty_scale: Tensor
    p: Tensor
    """scalar: the exponent of the present step; it never rises, also where a longer budget stretches its schedule"""

    def __init__(
        self,
        blocks: Blocks,
        d_sae: PositiveInt,
        coefficient: NonNegativeFloat,
        penalty: Literal["l1", "tanh", "log", "p"] = "l1",
        steepness: PositiveFloat = 4.0,
        p_end: Annotated[float, Field(gt=0, le=1)] = 0.2,
        p_steps: PositiveInt = 15,
        p_start_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25,
        decoder_norm: PositiveFloat = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(blocks, d_sae, **common)
        self.coefficient = coefficient
        self.penalty = penalty
        self.steepness = steepness
        self.p_end, self.p_steps, self.p_start_fraction = p_end, p_steps, p_start_fraction
        if penalty == "p":
            self.measures = ("sparsity_at_next_p",)
            self.register_buffer("penalty_scale", torch.ones(()))
            self.register_buffer("p", torch.ones(()))
        self.shrink_decoder_(decoder_norm)

    def respond(self, pre: Tensor, at: Callable[[Tensor], Tensor], inner: Tensor | None, now: Moment) -> Response:
        codes = pre.relu()
        sizes = codes * at(self.decoder_norms())
        if self.penalty == "l1":
            return Response(codes, sizes.sum())
        if self.penalty == "tanh":
            return Response(codes, torch.tanh(self.steepness * sizes).sum())
        if self.penalty == "log":
            return Response(codes, torch.log1p(self.steepness * sizes).sum())
        with torch.no_grad():
            at_next = _sum_of_powers(sizes, self._next_p(now))
        return Response(
            codes, self.penalty_scale * _sum_of_powers(sizes, self.p), measures={"sparsity_at_next_p": at_next}
        )

    def close_step(self, terms: dict[str, Tensor], now: Moment) -> None:
        if self.penalty != "p":
            return
        before, after, p_next = terms["sparsity"], terms["sparsity_at_next_p"], self._next_p(now)
        # where nothing fired there is no size to keep: a scale of 0 would never come back
        moves = (p_next < self.p) & (before > 0)
        self.penalty_scale.copy_(torch.where(moves, before / after.clamp_min(1e-30), self.penalty_scale))
        self.p.copy_(p_next)

    def activate(self, pre_BF: Tensor) -> Tensor:
        return pre_BF.relu()

    def _next_p(self, now: Moment) -> Tensor:
        """p in the next step."""
        done = (now.samples + now.batch) / now.total_samples
        done = (done - self.p_start_fraction) / (1 - self.p_start_fraction)
        return self.p.clamp_max(p_at(done, self.p_end, self.p_steps))


def p_at(done: float, p_end: float, p_steps: int) -> float:
    """Goes from 1 to `p_end` in equal steps while `done` goes from 0 to 1.

    >>> [round(p_at(done, 0.2, 4), 2) for done in (-1, 0, 0.3, 0.6, 0.9, 1)]
    [1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    step = min(p_steps, max(0, math.floor(done * p_steps)))
    return 1 + (p_end - 1) * step / p_steps


def _sum_of_powers(sizes: Tensor, p: Tensor) -> Tensor:
    """sum u^p over u > 0; where u is 0 the derivative of u^p would be infinite."""
    positive = sizes > 0
    return (torch.where(positive, sizes, 1.0).pow(p) * positive).sum()
