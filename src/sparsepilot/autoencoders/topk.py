"""TopK autoencoder (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from sparsepilot import losses
from sparsepilot.autoencoders.base import Autoencoder, Knob, Step, default_aux_k
from sparsepilot.ops.active import ActiveSet
from sparsepilot.ops.sparse import decode_at, encode_at
from sparsepilot.ops.topk import topk_grouped


class TopK(Autoencoder):
    """f(x) = TopK(ReLU(W_enc (x - b_dec) + b_enc)),  x_hat = W_dec^T f(x) + b_dec

    loss / V = ||x - x_hat||^2 / V + aux_k_coefficient * ||e - e_hat||^2 / ||e||^2

    with V = E||x - mean||^2 from the cache, e = x - x_hat (detached) and e_hat its reconstruction from the top
    `aux_k` dead latents, without b_dec. The loss is kept in units of squared input, as everywhere in this project.

    Args:
        d_in: input width.
        d_sae: number of latents.
        k: active latents per row.
        aux_k: dead latents per row that try to explain the residual; None means d_in / 2.
        aux_k_coefficient: alpha, 1/32 in the paper; 0 switches AuxK off.
    """

    architecture = "topk"
    term_names = ("recon", "aux_k")

    def __init__(
        self,
        d_in: PositiveInt,
        d_sae: PositiveInt,
        k: PositiveInt,
        aux_k: PositiveInt | None = None,
        aux_k_coefficient: NonNegativeFloat = 1 / 32,
    ) -> None:
        super().__init__(d_in, d_sae)
        self.k = k
        self.aux_k = aux_k or default_aux_k(d_in, d_sae)
        self.aux_k_coefficient = aux_k_coefficient

    @property
    def knob(self) -> Knob:
        return Knob("k", initial=self.k, low=1, high=self.d_sae)

    def forward(self, x_BD: Tensor, strength: float, dead_ids_A: Tensor, mean_sq_residual: Tensor) -> Step:
        k = round(strength)
        selected = topk_grouped(self.pre_activations(x_BD), k)
        active = ActiveSet(selected.ids_BK, self.d_sae)
        codes_BK = encode_at(x_BD, self.W_enc, self.b_enc, self.b_dec, selected.values_BK, active).relu()
        x_hat_BD = decode_at(codes_BK, self.W_dec, active) + self.b_dec

        recon = losses.reconstruction(x_BD, x_hat_BD)
        loss, terms = recon, {"recon": recon.detach()}
        if self.aux_k_coefficient > 0 and dead_ids_A.numel() > 0:
            aux = losses.aux_k(
                (x_BD - x_hat_BD).detach(), self._reconstruct_from_dead(x_BD, dead_ids_A), mean_sq_residual
            )
            loss = loss + self.aux_k_coefficient * self.total_variance * aux
            terms["aux_k"] = aux.detach()
        return Step(loss, terms, x_hat_BD.detach(), codes_BK.detach(), active)

    def _reconstruct_from_dead(self, x_BD: Tensor, dead_ids_A: Tensor) -> Tensor:
        """[B, D]: top `aux_k` of the dead latents, decoded without b_dec. Dense over the dead, who are few."""
        W_enc_AD = self.W_enc.index_select(0, dead_ids_A)
        pre_BA = (x_BD - self.b_dec) @ W_enc_AD.T + self.b_enc.index_select(0, dead_ids_A)
        if self.aux_k < dead_ids_A.numel():
            top = torch.topk(pre_BA, self.aux_k, dim=-1, sorted=False)
            pre_BA = torch.zeros_like(pre_BA).scatter(1, top.indices, top.values)
        return pre_BA.relu() @ self.W_dec.index_select(0, dead_ids_A)

    def activate(self, pre_BF: Tensor) -> Tensor:
        top = topk_grouped(pre_BF, self.k)
        return torch.zeros_like(pre_BF).scatter(1, top.ids_BK, top.values_BK.relu())

    def inference_config(self, strength: float) -> dict[str, int | float | str]:
        return {**super().inference_config(strength), "k": round(strength)}
