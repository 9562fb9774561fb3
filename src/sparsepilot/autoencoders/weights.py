"""The tensors of a dictionary, and what is done to them around a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.errors import ConfigError
from sparsepilot.parallel.latents import Shard, spread
from sparsepilot.parallel.shards import own, rows_of, total_norm

DRAWN_ROWS = 2**14
"""Rows of a fresh matrix that are drawn at once; a multiple of 16, torch's unit in drawing normal numbers."""


class Weights(nn.Module):
    """Parameters, all fp32:

        W_enc [d_sae, d_in]   rows are latents, so that the sparse step reads a latent's weights in one piece
        b_enc [d_sae]
        W_dec [d_sae, d_out]  unit rows where `unit_decoder`
        b_dec [d_out]         an autoencoder's b_in too; a transcoder's b_in is `mean_in`, a constant
        W_skip [d_out, d_in]  only with `blocks.skip`

    Args:
        blocks: the sites that are read and written.
        d_sae: number of latents.
        shard: which of the latents this process holds; all that is [d_sae, ...] here is [its latents, ...] then.

    Raises:
        ConfigError: where the latents cannot be dealt out as wanted.
    """

    unit_decoder: bool = True
    latent_buffers: tuple[str, ...] = ()
    """Names of the buffers [d_sae, ...] that are spread over ranks where parameters are."""
    per_latent: tuple[str, ...] = ("W_enc", "b_enc", "W_dec")
    """Names of the parameters and saved buffers that have a row for each latent."""
    mean_in: Tensor
    _decoder_mask: Tensor | None

    def __init__(self, blocks: Blocks, d_sae: int, shard: Shard) -> None:
        super().__init__()
        if d_sae % blocks.readers:
            raise ConfigError(
                f"model.d_sae = {d_sae}: must be a multiple of {blocks.readers}, the layers that share the latents"
            )
        if blocks.readers > 1 and not shard.is_whole:
            raise ConfigError(
                f"model.sites: a cross-layer transcoder's latents cannot be dealt out to {shard.ranks.size} ranks; use "
                "trainer=ddp, or an autoencoder, a crosscoder or a transcoder"
            )
        self.blocks, self.d_in, self.d_out, self.d_sae = blocks, blocks.d_in, blocks.d_out, d_sae
        self.shard = shard
        W_dec_FD = normal_rows(shard, blocks.d_out)
        mask_FD = blocks.decoder_mask(d_sae)
        if mask_FD is not None:
            W_dec_FD *= mask_FD
        W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
        W_enc_FD = W_dec_FD.clone()  # tied at the start: encoder rows equal decoder rows
        if not blocks.same:
            W_enc_FD = normal_rows(shard, blocks.encoder_width)
            W_enc_FD /= W_enc_FD.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(W_enc_FD)
        self.b_enc = nn.Parameter(torch.zeros(shard.num_latents))
        self.W_dec = nn.Parameter(W_dec_FD)
        self.b_dec = nn.Parameter(torch.zeros(blocks.d_out))
        self.W_skip = nn.Parameter(torch.zeros(blocks.d_out, blocks.d_in)) if blocks.skip else None
        if not blocks.same:
            self.register_buffer("mean_in", torch.zeros(blocks.d_in))
        self.register_buffer("_decoder_mask", mask_FD, persistent=False)
        self.total_variance = float(blocks.d_out)
        """E||y - mean||^2 in scaled units: what one unit of FVU is worth in the loss; set by `initialise`."""

    @property
    def b_in(self) -> Tensor:
        """[d_in] what is subtracted from the input: an autoencoder's b_dec, a transcoder's mean input."""
        return self.b_dec if self.blocks.same else self.mean_in

    @property
    def b_read(self) -> Tensor:
        """`b_in` for use by the latents held here: its gradient is summed over shards."""
        return self.shard.shared(self.b_in)

    def rest(self, x_BD: Tensor) -> Tensor:
        """What is added to the decoded latents: b_dec, and the skip's product; [B, d_out] or [1, d_out]."""
        if self.W_skip is None:
            return self.b_dec[None]
        return nn.functional.linear(x_BD - self.b_in, self.W_skip).to(self.b_dec.dtype) + self.b_dec

    def encoder_part(self, x_AD: Tensor, ids_A: Tensor) -> Tensor:
        """[A, encoder width]: of one input row per latent, the part that the latent reads."""
        if self.blocks.readers == 1:
            return x_AD
        reader_A = torch.div(ids_A, self.d_sae // self.blocks.readers, rounding_mode="floor")
        return x_AD.view(len(x_AD), self.blocks.readers, -1)[torch.arange(len(x_AD), device=x_AD.device), reader_A]

    def decoder_part(self, y_AD: Tensor, ids_A: Tensor) -> Tensor:
        """[A, d_out]: of one target row per latent, the columns that the latent may write."""
        return y_AD if self._decoder_mask is None else y_AD * self._decoder_mask[ids_A]

    def decoder_norms(self) -> Tensor:
        """[F] decoder norms, differentiable; ones where rows are kept at norm 1."""
        if self.unit_decoder and len(self.blocks.write_widths) == 1:
            return torch.ones_like(self.b_enc)
        return self.blocks.decoder_norms(self.W_dec)

    @torch.no_grad()
    def initialise(self, mean_in: Tensor, mean_out: Tensor, total_variance: float) -> None:
        """Takes the (scaled) means of inputs and targets and the targets' total variance E||y - mean||^2."""
        self.b_dec.copy_(mean_out)
        if not self.blocks.same:
            self.mean_in.copy_(mean_in)
        self.total_variance = total_variance

    @torch.no_grad()
    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Takes over tensors of `inference_tensors` (scaled, unit decoder rows) that another dictionary had; those that
        it had not stay as they are."""
        for name, parameter in self.named_parameters():
            if name in tensors:
                parameter.copy_(self.shard.own(tensors[name]) if name in self.per_latent else tensors[name])

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Takes the part of W_dec's gradient along each unit row out: it would only be undone by `after_step`."""
        grad_FD = self.W_dec.grad
        if grad_FD is None:
            return
        grad_FD, W_dec_FD = own(grad_FD), own(self.W_dec)
        if self._decoder_mask is not None:
            grad_FD.mul_(rows_of(self._decoder_mask, self.W_dec))
        if self.unit_decoder:
            along_F1 = torch.linalg.vecdot(grad_FD, W_dec_FD, dim=1)[:, None]
            grad_FD.addcmul_(along_F1, W_dec_FD, value=-1.0)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Scalar: the norm of the gradient of the whole dictionary."""
        by_name = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        if self.shard.is_whole:
            return total_norm(list(by_name.values()))
        here, alike = (
            total_norm([grad for name, grad in by_name.items() if (name in self.per_latent) == per_latent])
            for per_latent in (True, False)
        )
        sq_norm_1 = self.shard.sum_(here.double().square().view(1)) + alike.double().square()
        return sq_norm_1.sqrt().to(here.dtype).squeeze(0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Restores unit decoder rows after an optimizer step, and a cross-layer decoder's zeros, which Muon moves."""
        W_dec_FD = own(self.W_dec)
        if self._decoder_mask is not None:
            W_dec_FD.mul_(rows_of(self._decoder_mask, self.W_dec))
        if self.unit_decoder:
            W_dec_FD.div_(torch.linalg.vector_norm(W_dec_FD, dim=1, keepdim=True).clamp_min(1e-12))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; `lr_scale` multiplies the schedule. Biases are not decayed: b_dec holds the data's mean."""
        return weights_and_biases(self.parameters())

    def inference_tensors(self) -> dict[str, Tensor]:
        """Tensors of the scaled dictionary by name, in training's orientation ([d_sae, width]); a shard's are those of
        its own latents."""
        tensors = {
            "W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec, "b_in": self.b_in,
        }  # fmt: skip
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def whole_tensors(self) -> dict[str, Tensor]:
        """`inference_tensors` of the whole dictionary; those with rows for latents that others hold are DTensors."""
        return {
            name: tensor
            if self.shard.is_whole or name in ("b_dec", "b_in", "W_skip", "codes_factor")
            else spread(tensor)
            for name, tensor in self.inference_tensors().items()
        }


def normal_rows(shard: Shard, width: int) -> Tensor:
    """[its latents, width] standard normal numbers: those rows of `torch.randn(d_sae, width)`, bit for bit.

    All are drawn, by blocks, and few are ever held, so that a shard of a dictionary that fits nowhere can be made.
    """
    if shard.is_whole:
        return torch.randn(shard.d_sae, width)
    rows_FD = torch.empty(shard.num_latents, width)
    for first in range(0, shard.d_sae, DRAWN_ROWS):
        last = min(first + DRAWN_ROWS, shard.d_sae)
        if shard.d_sae - last < DRAWN_ROWS:  # never a short block: torch draws fewer than 16 numbers in another way
            last = shard.d_sae
        block_FD = torch.randn(last - first, width)
        begin, end = max(first, shard.first), min(last, shard.first + shard.num_latents)
        if begin < end:
            rows_FD[begin - shard.first : end - shard.first] = block_FD[begin - first : end - first]
        if last == shard.d_sae:
            break
    return rows_FD


def weights_and_biases(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Optimizer groups of matrices, and of all else, which weight decay leaves alone."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
