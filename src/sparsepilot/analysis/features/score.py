"""How much a latent means one thing: whether the texts on which it fires are alike.

The contexts n of a latent (those shown: the distinct ones of its largest activations, and a sample of all its firings)
get embeddings u_n, and the score is their mean cosine, weighted by activations a_n,

    score = sum_{n != m} a_n a_m <u_n, u_m> / sum_{n != m} a_n a_m

which is the monosemanticity score of Pach et al. 2025 (arXiv 2504.02821) but for the embedding. There it is that of an
image model; here it is made from the language model's token embeddings E alone, so that neither the layer nor the
dictionary has a say in it: the smooth-inverse-frequency average of Arora et al. 2017,

    u_n ~ sum_t w(t) 2^(-d(t) / HALF_TOKENS) e_t,  w(t) = A / (A + p(t)),  e_t = (E_t - mu) / |E_t - mu|,  |u_n| = 1

over the tokens t from d(t) before the firing up to the firing itself (what follows is not known to the model there),
p(t) a token's share of the text, and mu the mean of E under p w.

1: the same rare words each time; 0: no more alike than any texts. A latent on a frequent token alone (", the") scores
low: the text around has most of the weight then.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from sparsepilot.analysis.features.contexts import Shown
from sparsepilot.analysis.features.kept import BEFORE, NO_TOKEN, Kept

A = 1e-3
HALF_TOKENS = 4.0
FEWEST_CONTEXTS = 8
"""A latent with fewer has no score."""


class Scorer:
    """Scores latents.

    Args:
        embedding_VD: [V, D] fp32.
        token_counts_V: [V] int64, how often each token occurs in the text.
    """

    def __init__(self, embedding_VD: Tensor, token_counts_V: NDArray[np.int64]) -> None:
        share_V = torch.from_numpy(token_counts_V / max(1, int(token_counts_V.sum()))).float()
        self._weight_V = A / (A + share_V)
        mean_share_V = share_V * self._weight_V
        mean_D = mean_share_V @ embedding_VD / mean_share_V.sum().clamp_min(1e-12)
        self._unit_VD = normalize(embedding_VD - mean_D, dim=1)
        self._near_w = 2.0 ** (-torch.arange(BEFORE, -1, -1) / HALF_TOKENS)

    @torch.no_grad()
    def __call__(self, top: Kept, sample: Kept, latents: slice, shown: list[Shown]) -> list[float | None]:
        """The score of each of consecutive latents; None of one with fewer than FEWEST_CONTEXTS contexts."""
        tokens, values, sizes = [], [], []
        for latent, each in zip(range(latents.start, latents.stop), shown, strict=True):
            drawn = [slot for band in each.bands for slot in band]
            for kept, slots in ((top, each.top), (sample, drawn)):
                tokens.append(kept.token_FNW[latent, slots, : BEFORE + 1])
                values.append(kept.value_FN[latent, slots])
            sizes.append(len(each.top) + len(drawn))
        u_ND = self.embed(torch.from_numpy(np.concatenate(tokens)))
        a_N = torch.from_numpy(np.concatenate(values))
        return [
            _weighted_cosine(a_n, u_nD) if len(a_n) >= FEWEST_CONTEXTS else None
            for a_n, u_nD in zip(torch.split(a_N, sizes), torch.split(u_ND, sizes), strict=True)
        ]

    def embed(self, tokens_Nw: Tensor) -> Tensor:
        """[N, D] unit embeddings of texts of token ids [N, BEFORE + 1], NO_TOKEN where there is none."""
        there_Nw = tokens_Nw != NO_TOKEN
        ids_Nw = tokens_Nw.long().clamp_min(0)
        weights_Nw = self._weight_V[ids_Nw] * self._near_w * there_Nw
        return normalize(embedding_bag(ids_Nw, self._unit_VD, per_sample_weights=weights_Nw, mode="sum"), dim=1)


def _weighted_cosine(a_n: Tensor, u_nD: Tensor) -> float:
    """sum_{n != m} a_n a_m <u_n, u_m> / sum_{n != m} a_n a_m of unit vectors."""
    total_D = a_n @ u_nD
    own = a_n.square().sum()
    return float((total_D.square().sum() - own) / (a_n.sum().square() - own))
