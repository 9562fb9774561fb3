"""What every architecture is: parameters, one training step on a micro-batch, and a knob for the controller."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparsepilot.ops.active import ActiveSet


class Knob(NamedTuple):
    """What a controller may turn."""

    kind: Literal["k", "penalty"]
    """`k`: active latents per row. `penalty`: the coefficient of the sparsity loss."""
    initial: float
    low: float
    high: float


class Step(NamedTuple):
    """What one forward pass over a micro-batch gives."""

    loss: Tensor
    """Scalar with a graph: the mean over the micro-batch's rows of everything that is minimised."""
    terms: dict[str, Tensor]
    """Detached scalars by name: means over rows, before their coefficients. `recon` is always there."""
    x_hat_BD: Tensor
    """Detached reconstruction, in the scaled units of the input."""
    codes_BK: Tensor
    """Detached values of the active latents; a zero means that the slot is not active."""
    active: ActiveSet


class Autoencoder(nn.Module, ABC):
    """x_hat = b_dec + sum_i f_i(x) W_dec[i], with few f_i(x) > 0.

    Inputs are scaled so that E||x||^2 = d_in (the caller's job). Parameters, all fp32:

        W_enc [d_sae, d_in]   rows are latents, so that the sparse step reads a latent's weights in one piece
        b_enc [d_sae]
        W_dec [d_sae, d_in]   unit rows
        b_dec [d_in]          subtracted from the input too

    A subclass implements `forward` and `knob`, and `activate`, the plain dense form of its activation function.
    """

    architecture: str
    """Name in saved files: `topk`, `jumprelu`, ..."""
    term_names: tuple[str, ...] = ("recon",)
    """Every loss term that `forward` may report."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.d_in = d_in
        self.d_sae = d_sae
        W_FD = torch.randn(d_sae, d_in)
        W_FD /= W_FD.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(W_FD.clone())  # tied at the start: encoder rows equal decoder rows
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(W_FD)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.total_variance = float(d_in)
        """E||x - mean||^2 in scaled units: what one unit of FVU is worth in the loss; set by `initialise`."""
        self._workspace: Tensor | None = None

    @property
    @abstractmethod
    def knob(self) -> Knob:
        """The knob, its range and where it starts."""

    @abstractmethod
    def forward(self, x_BD: Tensor, strength: float, dead_ids_A: Tensor, mean_sq_residual: Tensor) -> Step:
        """One micro-batch.

        Args:
            x_BD: [B, d_in] scaled inputs.
            strength: value of the knob.
            dead_ids_A: [A] ids of the latents that count as dead now (may be empty).
            mean_sq_residual: scalar, E||x - x_hat||^2 of the previous optimizer step over all ranks, AuxK's unit.
        """

    def evaluate(self, x_BD: Tensor, strength: float) -> Step:
        """A step as at inference, for measuring: nothing is dead, nothing has a graph."""
        with torch.no_grad():
            nobody_A = torch.empty(0, dtype=torch.int64, device=x_BD.device)
            step: Step = self(x_BD, strength, nobody_A, x_BD.new_ones(()))
            return step

    @abstractmethod
    def activate(self, pre_BF: Tensor) -> Tensor:
        """Dense codes [B, F] from dense pre-activations, as at inference."""

    def encode(self, x_BD: Tensor) -> Tensor:
        """Dense codes [B, F] of scaled inputs: the plain form of what `forward` does sparsely."""
        return self.activate((x_BD - self.b_dec) @ self.W_enc.T + self.b_enc)

    def decode(self, codes_BF: Tensor) -> Tensor:
        """[B, d_in] scaled reconstruction of dense codes."""
        return codes_BF @ self.W_dec + self.b_dec

    @torch.no_grad()
    def initialise(self, mean_D: Tensor, total_variance: float) -> None:
        """Takes the (scaled) data's mean, [d_in], where b_dec starts, and its total variance E||x - mean||^2."""
        self.b_dec.copy_(mean_D)
        self.total_variance = total_variance

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Takes the part of W_dec's gradient along each unit row out: it would only be undone by `after_step`."""
        grad_FD = self.W_dec.grad
        if grad_FD is not None:
            along_F = torch.linalg.vecdot(grad_FD, self.W_dec, dim=1)
            grad_FD.addcmul_(along_F[:, None], self.W_dec, value=-1.0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Restores unit decoder rows after an optimizer step."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def pre_activations(self, x_BD: Tensor) -> Tensor:
        """[B, F] pre-activations without a graph, in a buffer that the next call overwrites.

        A fresh [B, F] tensor costs more in page faults on CPU than the selection that reads it.
        """
        shape = (x_BD.shape[0], self.d_sae)
        space = self._workspace
        if space is None or space.shape != shape or space.dtype != x_BD.dtype or space.device != x_BD.device:
            space = self._workspace = torch.empty(shape, dtype=x_BD.dtype, device=x_BD.device)
        return torch.addmm(self.b_enc, x_BD - self.b_dec, self.W_enc.T, out=space)

    def inference_config(self, strength: float) -> dict[str, int | float | str]:
        """What a loader needs beside the tensors, with the knob at `strength`; JSON values only."""
        return {"architecture": self.architecture, "d_in": self.d_in, "d_sae": self.d_sae}

    def inference_tensors(self) -> dict[str, Tensor]:
        """Tensors under the field's usual names and orientation: W_enc [d_in, d_sae], W_dec [d_sae, d_in]."""
        return {"W_enc": self.W_enc.detach().T, "b_enc": self.b_enc.detach(),
                "W_dec": self.W_dec.detach(), "b_dec": self.b_dec.detach()}  # fmt: skip


def default_aux_k(d_in: int, d_sae: int) -> int:
    """Half the input width (Gao et al. 2024), at most d_sae."""
    return min(math.ceil(d_in / 2), d_sae)
