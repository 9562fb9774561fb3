"""ReLU autoencoder with an L1 penalty or one of its relatives (Conerly et al., Transformer Circuits, April 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Unpack

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from sparsepilot.autoencoders.base import Common
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.penalised import Penalised
from sparsepilot.autoencoders.rescaling import Rescaling
from sparsepilot.autoencoders.step import Dense, Moment, Response, Selection
from sparsepilot.ops.product import EncoderProduct


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
        rescale: at inference, and in what is exported, all codes times one factor, which undoes what the penalty takes
            from their size (`Rescaling`).
    """

    architecture = "relu"
    unit_decoder = False
    penalty_scale: Tensor
    p_step: Tensor
    """scalar int64: steps that p has taken; it never goes back, also where a longer budget stretches its schedule"""
    p_2: Tensor
    """[2] p in this step and in the next; a tensor, so that a compiled step is one for every p"""

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
        rescale: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(blocks, d_sae, **common)
        self.coefficient = coefficient
        self.penalty = penalty
        # a code that has outgrown tanh is not pressed on any more: latents shrink and die one after the other, for as
        # long as the penalty is off its balance (docs/log.md, 2026-11-30)
        self.integrates = penalty == "tanh"
        self.steepness = steepness
        self.p_end, self.p_steps, self.p_start_fraction = p_end, p_steps, p_start_fraction
        # what a step asks of p without waiting for the device: p_step, whether p is 1, whether it moves after this step
        self._p_step: int | None = None
        self._p_is_one, self._p_moves = True, False
        if penalty == "p":
            self.measures += ("sparsity_at_next_p",)
            self.register_buffer("penalty_scale", torch.ones(()))
            self.register_buffer("p_step", torch.zeros((), dtype=torch.int64))
            self.register_buffer("p_2", torch.ones(2), persistent=False)
        if rescale:
            self.rescaling = Rescaling()
            self.measures += self.rescaling.measures
        self.shrink_decoder_(decoder_norm)

    def select(self, product: Callable[..., EncoderProduct], now: Moment) -> Selection | Dense:
        if self.penalty == "p":
            step, step_next = self._p_steps(now)
            self._p_is_one, self._p_moves = self._p_at(step) == 1.0, step_next != step
            self.p_2[0], self.p_2[1] = self._p_at(step), self._p_at(step_next)
        return super().select(product, now)

    def respond(self, pre: Tensor, at: Callable[[Tensor], Tensor], inner: Tensor | None, now: Moment) -> Response:
        codes = pre.relu()
        sizes = codes * at(self.decoder_norms())
        if self.penalty == "l1":
            return Response(codes, sizes.sum())
        if self.penalty == "tanh":
            return Response(codes, torch.tanh(self.steepness * sizes).sum())
        if self.penalty == "log":
            return Response(codes, torch.log1p(self.steepness * sizes).sum())
        # a power costs more than all else of a dense step, and p is 1 while a run is densest
        total = sizes.sum() if self._p_is_one else _sum_of_powers(sizes, self.p_2[0])
        with torch.no_grad():
            at_next = _sum_of_powers(sizes, self.p_2[1]) if self._p_moves else total.detach()
        return Response(codes, self.penalty_scale * total, measures={"sparsity_at_next_p": at_next})

    def close_step(self, terms: dict[str, Tensor], now: Moment) -> None:
        if self.rescaling is not None:
            self.rescaling.update(terms)
        if self.penalty != "p":
            return
        step, step_next = self._p_steps(now)
        if step_next == step:
            return
        before, after = terms["sparsity"], terms["sparsity_at_next_p"]
        # where nothing fired there is no size to keep: a scale of 0 would never come back
        scale = torch.where(before > 0, before / after.clamp_min(1e-30), self.penalty_scale)
        self.penalty_scale.copy_(scale)
        self.p_step.fill_(step_next)
        self._p_step = step_next

    def activate(self, pre_BF: Tensor) -> Tensor:
        return pre_BF.relu()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        self._p_step = None

    def _p_steps(self, now: Moment) -> tuple[int, int]:
        """Steps that p has taken, in this step and in the next."""
        if self._p_step is None:
            self._p_step = int(self.p_step)
        done = (now.samples + now.batch) / now.total_samples
        done = (done - self.p_start_fraction) / (1 - self.p_start_fraction)
        return self._p_step, max(self._p_step, steps_of_p(done, self.p_steps))

    def _p_at(self, step: int) -> float:
        return 1 + (self.p_end - 1) * step / self.p_steps


def steps_of_p(done: float, p_steps: int) -> int:
    """Of `p_steps` equal steps those taken, while `done` goes from 0 to 1.

    >>> [steps_of_p(done, 4) for done in (-1, 0, 0.3, 0.6, 0.9, 1)]
    [0, 0, 1, 2, 3, 4]
    """
    return min(p_steps, max(0, math.floor(done * p_steps)))


def _sum_of_powers(sizes: Tensor, p: Tensor) -> Tensor:
    """sum u^p over u > 0; where u is 0 the derivative of u^p would be infinite."""
    positive = sizes > 0
    return (torch.where(positive, sizes, 1.0).pow(p) * positive).sum()
