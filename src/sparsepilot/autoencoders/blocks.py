"""Which sites a dictionary reads and which it writes: an autoencoder, a crosscoder, a transcoder, a cross-layer one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The shape of a dictionary around its latents, orthogonal to the architecture, chosen by the data's sites.

    | kind | reads | writes |
    |---|---|---|
    | autoencoder | one site | the same |
    | crosscoder (Lindsey et al. 2024) | several sites side by side | the same |
    | transcoder (Dunefsky et al. 2024, arXiv 2406.11944) | some sites | others, with or without a linear skip |
    | cross-layer transcoder (Ameisen et al. 2025) | L sites, each by its share of latents | that site and later ones |

    The decoder of a cross-layer transcoder is one [d_sae, d_out] matrix in which L(L+1)/2 blocks may differ from 0.
    """

    read_widths: tuple[int, ...]
    write_widths: tuple[int, ...]
    same: bool = True
    """What is written is what is read (autoencoder, crosscoder)."""
    skip: bool = False
    cross_layer: bool = False

    @classmethod
    def autoencoder(cls, *widths: int) -> Blocks:
        """One site, or several that are read and written together (a crosscoder)."""
        return cls(tuple(widths), tuple(widths))

    @property
    def d_in(self) -> int:
        """Width of all sites that are read."""
        return sum(self.read_widths)

    @property
    def d_out(self) -> int:
        """Width of all sites that are written."""
        return sum(self.write_widths)

    @property
    def kind(self) -> str:
        """As in the table above."""
        if self.cross_layer:
            return "cross_layer_transcoder"
        if not self.same:
            return "transcoder"
        return "autoencoder" if len(self.read_widths) == 1 else "crosscoder"

    @property
    def readers(self) -> int:
        """Parts of the latents that read different sites: L for a cross-layer transcoder, 1 for all others."""
        return len(self.read_widths) if self.cross_layer else 1

    @property
    def encoder_width(self) -> int:
        """Inputs of one latent."""
        return self.d_in // self.readers

    def decoder_mask(self, d_sae: int) -> Tensor | None:
        """[d_sae, d_out] bool: which decoder weights there are; None where all are."""
        if not self.cross_layer:
            return None
        layers = len(self.read_widths)
        latents_LF = torch.arange(layers).repeat_interleave(d_sae // layers)
        columns = torch.cat([torch.full((width,), layer) for layer, width in enumerate(self.write_widths)])
        return columns[None, :] >= latents_LF[:, None]

    def decoder_norms(self, W_dec_FD: Tensor) -> Tensor:
        """[F]: a latent's decoder norm, differentiable. Over several sites: the sum of their norms (crosscoders,
        Lindsey et al. 2024); of a cross-layer transcoder the norm over all layers that it writes (CLT-Forge's code)."""
        if self.cross_layer:
            whole: Tensor = torch.linalg.vector_norm(W_dec_FD, dim=1)
            return whole
        norms = [part.norm(dim=1) for part in torch.split(W_dec_FD, list(self.write_widths), dim=1)]
        return norms[0] if len(norms) == 1 else torch.stack(norms).sum(dim=0)
