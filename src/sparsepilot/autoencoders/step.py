"""What goes in and out of a training step of an architecture."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from sparsepilot.ops.active import ActiveSet


class Knob(NamedTuple):
    """What a controller may turn."""

    kind: Literal["k", "penalty"]
    """`k`: active latents per row. `penalty`: the coefficient of the sparsity loss."""
    initial: float
    low: float
    high: float
    steered_by: str | None = None
    """what of the model's own steers L0 already, where something does: no closed loop may then"""
    whole: bool = False
    """a k that is rounded to a whole number"""


class Moment(NamedTuple):
    """Where a run stands: everything that a step depends on beside parameters and rows."""

    strength: float
    """value of the knob"""
    samples: int
    """the clock after the present global batch"""
    batch: int
    """rows of a global batch"""
    total_samples: int
    """the budget"""
    dead_ids_A: Tensor
    """[A] ids of the latents that count as dead now (may be empty)"""
    mean_sq_residual: Tensor
    """scalar, E||y - y_hat||^2 of the previous optimizer step over all ranks, AuxK's unit"""
    seed: int = 0
    """of the run; what is random in a step is seeded from it and `samples`"""
    inference: bool = False
    """as at inference: BatchTopK's threshold, no annealing, rescaled codes"""


class Selection(NamedTuple):
    """Which pairs a step touches, found sparsely."""

    active: ActiveSet
    pre_P: Tensor
    """[P] their pre-activations, without a graph"""
    inner_P: Tensor | None = None
    """[P] bool: which of them count in the main reconstruction; None: all"""
    measures: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """scalars that `close_step` and the log want"""


class Dense(NamedTuple):
    """So many pairs are active that the dense path is cheaper."""

    bound: Tensor | None = None
    """what `keep` needs to know of the whole batch"""
    measures: dict[str, Tensor] = {}  # noqa: RUF012 - never written to


class Extra(NamedTuple):
    """Another reconstruction from the same pairs that adds its squared error to the loss."""

    name: str
    codes: Tensor
    weight: float
    frozen: bool
    """gradients reach the encoder only"""


class Response(NamedTuple):
    """What an architecture makes of pre-activations, elementwise: of [P] pairs, or of a dense [b, F] tile."""

    codes: Tensor
    """values of the latents, 0 where they are not active; the shape of the pre-activations"""
    penalty: Tensor | None = None
    """scalar: the sparsity loss summed over the elements; the knob multiplies it"""
    extras: tuple[Extra, ...] = ()
    measures: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """sums over the elements that `close_step` and the log want, detached"""


class Step(NamedTuple):
    """What one forward pass over a micro-batch gives."""

    loss: Tensor
    """Scalar with a graph: the mean over the micro-batch's rows of everything that is minimised."""
    terms: dict[str, Tensor]
    """Detached scalars by name: means over rows, before their coefficients. `recon` is always there."""
    y_hat_BD: Tensor
    """Detached reconstruction, in the scaled units of the target."""
    firings_F: Tensor
    """[F] int64: on how many rows each latent is active; their sum over rows is the L0."""


class Sums(NamedTuple):
    """Sums over rows, with graphs: they add up over tiles."""

    y_hat_BD: Tensor
    recon: Tensor
    prefixes: Tensor
    penalty: Tensor
    firings_F: Tensor
    extras: tuple[Tensor, ...]
    measures: tuple[Tensor, ...]
