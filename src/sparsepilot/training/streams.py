"""A step whose bits do not hang on the number of ranks: gradients per stream, added up in a fixed tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsepilot.parallel.mesh import alone
from sparsepilot.training.trainee import Trainee
from sparsepilot.types import Batch


class Tree:
    """Adds up lists of tensors pairwise: ((a + b) + (c + d)) + ..., whatever the number of ranks they are spread over.

    The streams of one of 1, 2, 4, ... ranks are a whole branch of the tree. Holds log2(number) partial sums at a time.

    >>> tree = Tree()
    >>> for number in range(4):
    ...     tree.add([torch.tensor(float(number))])
    >>> tree.total()
    [tensor(6.)]
    """

    def __init__(self) -> None:
        self._branches: list[tuple[int, list[Tensor]]] = []

    def add(self, leaf: Sequence[Tensor]) -> None:
        """Adds a leaf; its tensors may be written to."""
        size, values = 1, list(leaf)
        while self._branches and self._branches[-1][0] == size:
            _, before = self._branches.pop()
            values = [a.add_(b) for a, b in zip(before, values, strict=True)]
            size *= 2
        self._branches.append((size, values))

    def total(self) -> list[Tensor]:
        """The sum of a power of two of leaves."""
        [(_, values)] = self._branches
        return values


def loss_stream_by_stream(trainees: Sequence[Trainee], batch: Batch, samples: int) -> Tensor:
    """The loss of this rank's rows, whose backward pass gives gradients that were added up stream by stream.

    Each stream's rows are a micro-batch of their own: the same product of the same shape on whichever rank it is. (So
    BatchTopK selects within a stream's rows, as it does within a micro-batch under accumulation.)

    Args:
        trainees: they share no parameter.
        batch: of a power of two of streams.
        samples: the clock after the present global batch.
    """
    parameters = [p for trainee in trainees for p in trainee.autoencoder.parameters() if p.requires_grad]
    gradients, sums = Tree(), Tree()
    with alone():
        for x_BD in batch.x_BD.chunk(batch.num_streams):
            loss = torch.stack([trainee(x_BD, samples) for trainee in trainees]).sum()
            gradients.add(torch.autograd.grad(loss, parameters))
            sums.add([loss.detach().clone(), *(trainee.sums_S.clone() for trainee in trainees)])
            for trainee in trainees:
                trainee.sums_S.zero_()
    total, *measured = sums.total()
    for trainee, sums_S in zip(trainees, measured, strict=True):
        trainee.sums_S.copy_(sums_S)
    means = [gradient.div_(batch.num_streams) for gradient in gradients.total()]
    given: Tensor = _Given.apply(total / batch.num_streams, means, *parameters)  # type: ignore[no-untyped-call]
    return given


class _Given(torch.autograd.Function):
    """A number with given gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(gradient * scale for gradient in ctx.gradients))
