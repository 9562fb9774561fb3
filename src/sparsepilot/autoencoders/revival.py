"""What is done about dead latents: AuxK, a loss on their pre-activations, resampling, or nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsepilot import losses
from sparsepilot.ops.among_shards import among_all, choose_topk
from sparsepilot.ops.product import EncoderProduct, tile_bytes
from sparsepilot.ops.select import select_topk
from sparsepilot.ops.sparse import decode_at, encode_at
from sparsepilot.ops.topk import topk_plain

if TYPE_CHECKING:
    from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.step import Moment


class Revival:
    """A loss term on dead latents, or an occasional operation on them. Who is dead is decided elsewhere, in one place
    (`metrics.dead`)."""

    term_name: str | None = None
    """of the loss term, if there is one"""

    def weight(self, model: Autoencoder) -> float:
        """What the term is multiplied with."""
        return 0.0

    def term(self, model: Autoencoder, x_BD: Tensor, e_BD: Tensor, now: Moment, num_dead: int) -> Tensor:
        """The term's mean over the rows of a micro-batch.

        Args:
            model: in training.
            x_BD: scaled inputs.
            e_BD: the main reconstruction's residual, detached.
            now: where the run stands; of the dead latents it knows those held here.
            num_dead: at least 1, over all shards.
        """
        raise NotImplementedError


class NoRevival(Revival):
    """Dead latents stay dead."""


class AuxK(Revival):
    """coefficient * V * ||e - e_hat||^2 / ||e||^2 (Gao et al. 2024, arXiv 2406.04093, appendix A.2)

    e_hat is the reconstruction of the residual e from each row's top `aux_k` dead latents, decoded without b_dec;
    V = E||y - mean||^2 keeps the loss in units of squared input, as everywhere in this project. There is no ReLU on
    these pre-activations: with one, the quickest way to a smaller loss is to push them all below 0, where no gradient
    reaches them any more (docs/log.md, 2026-11-22).

    Args:
        aux_k: dead latents per row that try to explain the residual; None means d_out / 2.
        coefficient: alpha, 1/32 in the paper.
    """

    term_name = "aux_k"

    def __init__(self, aux_k: PositiveInt | None = None, coefficient: NonNegativeFloat = 1 / 32) -> None:
        self.aux_k = aux_k
        self.coefficient = coefficient

    def weight(self, model: Autoencoder) -> float:
        return self.coefficient * model.total_variance

    def term(self, model: Autoencoder, x_BD: Tensor, e_BD: Tensor, now: Moment, num_dead: int) -> Tensor:
        k = min(self.aux_k or math.ceil(model.d_out / 2), num_dead)
        if k < model.dense_above * num_dead and model.blocks.readers == 1:
            sq_error = self._sparse(model, x_BD, e_BD, now.dead_ids_A, k)
        else:
            sq_error = self._dense(model, x_BD, e_BD, now.dead_ids_A, k, num_dead)
        return losses.aux_k(sq_error / len(x_BD), now.mean_sq_residual, floor=1e-12 * model.total_variance)

    def _sparse(self, model: Autoencoder, x_BD: Tensor, e_BD: Tensor, ids_A: Tensor, k: int) -> Tensor:
        W_enc_AD, b_enc_A = model.W_enc.index_select(0, ids_A), model.b_enc.index_select(0, ids_A)
        with torch.no_grad():
            product = EncoderProduct(x_BD - model.b_in, W_enc_AD, b_enc_A, model._workspace, model.tile_latents)
            top = select_topk(product, min(k, ids_A.numel()))
            active, pre_P, _ = choose_topk(top, k, ids_A.numel(), model.shard)
        pre_P = encode_at(x_BD, W_enc_AD, b_enc_A, model.b_read, pre_P, active)
        e_hat_BD = model.shard.sum(decode_at(pre_P, model.W_dec.index_select(0, ids_A), active))
        return losses.squared_error(e_BD, e_hat_BD)

    def _dense(self, model: Autoencoder, x_BD: Tensor, e_BD: Tensor, ids_A: Tensor, k: int, num_dead: int) -> Tensor:
        W_dec_AD = model.W_dec.index_select(0, ids_A)

        def tile(x_BD: Tensor, e_BD: Tensor) -> Tensor:
            pre_BA = model.encode_subset(x_BD, ids_A)
            if k < num_dead:
                top = topk_plain(pre_BA, min(k, ids_A.numel()))
                (kept_BK,) = among_all(top, [k], model.shard)
                pre_BA = torch.zeros_like(pre_BA).scatter(1, top.ids_BK, top.values_BK * kept_BK)
            return losses.squared_error(e_BD, model.shard.sum((pre_BA @ W_dec_AD).to(e_BD.dtype)))

        return _over_row_tiles(tile, num_dead, x_BD, e_BD)


class PreActivation(Revival):
    """coefficient * sum over dead latents of ReLU(threshold - pre) * ||W_dec|| (Conerly et al., Transformer Circuits,
    January 2025): a gradient that lifts them until they fire.

    Args:
        coefficient: 3e-6 in the source, where the other terms are as large as here.
    """

    term_name = "pre_activation"

    def __init__(self, coefficient: PositiveFloat = 3e-6) -> None:
        self.coefficient = coefficient

    def weight(self, model: Autoencoder) -> float:
        return self.coefficient

    def term(self, model: Autoencoder, x_BD: Tensor, e_BD: Tensor, now: Moment, num_dead: int) -> Tensor:
        ids_A = now.dead_ids_A
        norms_A = model.decoder_norms().index_select(0, ids_A)
        thresholds_A = model.thresholds().index_select(0, ids_A)

        def tile(x_BD: Tensor, _: Tensor) -> Tensor:
            return model.shard.sum(((thresholds_A - model.encode_subset(x_BD, ids_A)).relu() * norms_A).sum())

        return _over_row_tiles(tile, num_dead, x_BD, e_BD) / len(x_BD)


class Resample(Revival):
    """Every so often each dead latent is pointed at a row that is badly reconstructed (Bricken et al., Transformer
    Circuits, October 2023); how, stands in training/resample.py. It counts as dead until it fires.

    Args:
        every_samples: the clock's distance from one resampling to the next; None: the window after which a silent
            latent counts as dead.
        until: share of the budget after which no latent is resampled any more, so that all have time to settle.
        encoder_scale: norm of a new encoder row as a share of the mean norm of the living ones; None: as suits the
            architecture, 0.2 (the source's) under a penalty and 1 where latents compete for k places.
    """

    def __init__(
        self,
        every_samples: PositiveInt | None = None,
        until: Annotated[float, Field(gt=0, le=1)] = 0.75,
        encoder_scale: PositiveFloat | None = None,
    ) -> None:
        self.every_samples = every_samples
        self.until = until
        self.encoder_scale = encoder_scale

    def is_due(self, samples: int, batch: int, total_samples: int, dead_window: int) -> bool:
        """Whether dead latents are resampled after the step that ends at `samples`."""
        every = max(1, self.every_samples or dead_window)
        return samples <= self.until * total_samples and samples // every > (samples - batch) // every


def _over_row_tiles(tile, num_columns: int, x_BD: Tensor, e_BD: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Sum of `tile(x, e)` over tiles of rows, each computed again in the backward pass instead of being kept."""
    rows = max(64, tile_bytes(x_BD.device) // (x_BD.element_size() * num_columns))
    parts = [
        checkpoint(tile, x, e, use_reentrant=False, preserve_rng_state=False)
        for x, e in zip(torch.split(x_BD, rows), torch.split(e_BD, rows), strict=True)
    ]
    return torch.stack(parts).sum()
