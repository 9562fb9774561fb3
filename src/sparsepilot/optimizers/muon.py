"""Muon for matrices and Adam for everything else, as one optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sparsepilot.parallel.shards import own, rows_of

Momentum = Annotated[float, Field(ge=0, lt=1)]


class MuonWithAdam(Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on matrices, Adam on biases and thresholds.

        M <- momentum M + (1 - momentum) G
        W <- (1 - lr weight_decay) W - 0.2 lr sqrt(max(rows, columns)) NewtonSchulz(momentum M + (1 - momentum) G)

    NewtonSchulz(X) is about U V^T where X = U S V^T, of root mean square 1 / sqrt(max(rows, columns)). The factor
    before it ("match_rms_adamw", Moonlight, arXiv 2502.16982) therefore moves every entry by about 0.2 lr, which is
    what Adam's steps come to: one learning rate, and one schedule, suits both. With Muon's original factor,
    sqrt(max(1, rows / columns)), the matrices would want a rate of their own.

    A group with both kinds of parameters becomes two, each with all of the group's options. What one rule does not know
    (Muon: `betas`) it ignores.

    Args:
        params: parameters or groups; parameters of exactly two dimensions are matrices.
        lr: learning rate of both.
        momentum: of Muon, with Nesterov's look ahead.
        ns_steps: Newton-Schulz iterations.
        weight_decay: decoupled, of matrices only; a group's own `weight_decay` holds for all of its parameters.
        betas: of Adam.
        eps: of Adam.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: PositiveFloat = 1e-3,
        momentum: Momentum = 0.95,
        ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5,
        weight_decay: NonNegativeFloat = 0.0,
        betas: tuple[Momentum, Momentum] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-8,
    ) -> None:
        # torch's two own optimizers do the work; they are made with a stand-in and lent our groups at each step. AdamW
        # without weight decay is Adam, to the bit, and decays as Muon does where a group asks for it.
        self._rules: dict[str, Optimizer] = {
            "muon": torch.optim.Muon(
                [torch.zeros(1, 1)],
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            "adam": torch.optim.AdamW([torch.zeros(1)], lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True),
        }
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds the matrices and the rest as groups of their own; `rule` in a group says which it is."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for rule, optimizer in self._rules.items():
            own = [p for p in params if (p.ndim == 2) == (rule == "muon")]
            if own:
                super().add_param_group({**optimizer.defaults, **param_group, "params": own, "rule": rule})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, optimizer in self._rules.items():
            # lent anew each time: loading a state dict replaces both
            optimizer.state = self.state
            optimizer.param_groups = groups = [group for group in self.param_groups if group["rule"] == rule]
            if rule == "muon" and any(isinstance(p, DTensor) for group in groups for p in group["params"]):
                self._step_whole(optimizer, groups)
            else:
                optimizer.step()
        return loss

    def _step_whole(self, muon: Optimizer, groups: list[dict[str, Any]]) -> None:
        """Matrices that are spread over ranks: every rank orthogonalises the whole of each, one after the other, and
        keeps its rows. (On the parts torch would add up products of bfloat16 in bfloat16, to other digits.)"""
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                stand_in = torch.nn.Parameter(_whole(parameter.detach()))
                stand_in.grad = _whole(parameter.grad)
                muon.state = defaultdict(dict, {stand_in: {name: _whole(value) for name, value in state.items()}})
                muon.param_groups = [{**group, "params": [stand_in]}]
                muon.step()
                own(parameter).copy_(rows_of(stand_in, parameter))
                for name, value in muon.state[stand_in].items():
                    if name not in state:
                        state[name] = torch.zeros_like(parameter)
                    own(state[name]).copy_(rows_of(value, parameter))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
