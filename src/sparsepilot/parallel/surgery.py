"""The one place where parameters are changed by hand while an optimizer holds state about them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sparsepilot.parallel.shards import box_of, own


@torch.no_grad()
def set_rows_(parameter: nn.Parameter, ids_A: Tensor, rows: Tensor | float, optimizer: Optimizer) -> None:
    """Writes `rows` ([A, ...] or a number) into `parameter[ids]` and forgets what the optimizer remembers of them.

    Every tensor of the parameter's optimizer state that has the parameter's shape (moments, momentum) becomes 0 there.
    (`parameter[mask][:n] = rows` would write to a copy.) Of a parameter that is spread over ranks, each writes the rows
    that it holds.
    """
    if isinstance(parameter, DTensor):
        box = box_of(parameter)
        here_A = ids_A - box.start[0]
        own_A = (here_A >= 0) & (here_A < box.shape[0])
        ids_A, rows = here_A[own_A], rows[own_A] if isinstance(rows, Tensor) else rows
    own(parameter)[ids_A] = rows.to(parameter.dtype) if isinstance(rows, Tensor) else rows
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            own(value)[ids_A] = 0
