"""The one place where parameters are changed by hand while an optimizer holds state about them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def set_rows_(parameter: nn.Parameter, ids_A: Tensor, rows: Tensor | float, optimizer: Optimizer) -> None:
    """Writes `rows` ([A, ...] or a number) into `parameter[ids]` and forgets what the optimizer remembers of them.

    Every tensor of the parameter's optimizer state that has the parameter's shape (moments, momentum) becomes 0 there.
    (`parameter[mask][:n] = rows` would write to a copy.)
    """
    parameter[ids_A] = rows if isinstance(rows, float | int) else rows.to(parameter.dtype)
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[ids_A] = 0
