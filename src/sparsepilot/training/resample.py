"""Resampling of dead latents (Bricken et al., Transformer Circuits, October 2023, appendix on resampling)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.ops.seeded import generator_at
from sparsepilot.parallel.collectives import all_gather_concat, all_reduce_sum_, rank
from sparsepilot.parallel.shards import own, rows_of, sum_over_parts
from sparsepilot.parallel.surgery import set_rows_


@torch.no_grad()
def resample(
    model: Autoencoder, dead_ids_A: Tensor, xc_BD: Tensor, yc_BD: Tensor, sq_error_B: Tensor,
    encoder_scale: float, seed: int, samples: int, optimizer: Optimizer,
) -> int:  # fmt: skip
    """Points dead latents at rows of the present global batch that are badly reconstructed.

    (A shard of a dictionary takes its own dead latents' share of the rows drawn for all.)

    Rows are drawn without replacement, with probability proportional to the square of their loss, by a generator seeded
    from (seed, samples), the same on all ranks. A latent's decoder row becomes the row's centred target at norm 1 (at
    the living latents' mean norm where decoder rows are free), its encoder row the centred input at `encoder_scale`
    times the mean norm of the living encoder rows, its bias 0, its other parameters the mean of the living ones.

    Args:
        xc_BD, yc_BD: [B, d_in], [B, d_out] this rank's rows of the batch, scaled, b_in and b_dec subtracted.
        sq_error_B: [B] ||y - y_hat||^2 of each.

    Returns:
        How many latents were resampled, on all shards: no more than there are rows with a loss.
    """
    shard = model.shard
    living_F = torch.ones(shard.num_latents, dtype=torch.bool, device=xc_BD.device)
    living_F[dead_ids_A] = False
    weights_N = all_gather_concat(sq_error_B.double().square())
    dead_S: list[int] = shard.gather(torch.tensor([dead_ids_A.numel()], device=xc_BD.device)).flatten().tolist()
    num_drawn = min(sum(dead_S), int(torch.count_nonzero(weights_N)))
    if num_drawn == 0 or sum(dead_S) == shard.d_sae:
        return 0
    make = generator_at(seed, samples)
    # Gumbel's trick: the largest of log weight + noise are a draw without replacement, of any number of rows
    noise_N = -(-torch.rand(weights_N.shape, generator=make, dtype=torch.float64).log()).log()
    drawn_A = torch.topk(weights_N.cpu().log() + noise_N, num_drawn).indices.to(xc_BD.device)
    before = sum(dead_S[: shard.ranks.rank])  # dead latents are numbered over all shards
    drawn_A = drawn_A[before : before + dead_ids_A.numel()]
    ids_A = dead_ids_A[: drawn_A.numel()]

    counts = all_gather_concat(torch.tensor([len(sq_error_B)], device=xc_BD.device))
    first = int(counts[: rank()].sum())
    x_AD = _gather(xc_BD, drawn_A, first)
    y_AD = _gather(yc_BD, drawn_A, first)

    def mean_of_living(parameter: Tensor) -> Tensor:
        values_A = own(parameter)[rows_of(living_F, parameter)]
        values_A = values_A.norm(dim=1) if values_A.ndim == 2 else values_A
        here = torch.stack([values_A.sum(), values_A.new_tensor(float(len(values_A)))])
        total, count = shard.sum_(sum_over_parts(here, parameter))
        mean: Tensor = total / count
        return mean

    encoder_norm = mean_of_living(model.W_enc) * encoder_scale
    decoder_norm = 1.0 if model.unit_decoder else mean_of_living(model.W_dec)
    set_rows_(model.W_enc, ids_A, encoder_norm * _unit(model.encoder_part(x_AD, ids_A)), optimizer)
    set_rows_(model.W_dec, ids_A, decoder_norm * _unit(model.decoder_part(y_AD, ids_A)), optimizer)
    for name, parameter in model.named_parameters():
        if name in model.per_latent and parameter.ndim == 1:
            value = 0.0 if name == "b_enc" else float(mean_of_living(parameter))
            set_rows_(parameter, ids_A, value, optimizer)
    model.forget_motion()
    return num_drawn


def _gather(rows_BD: Tensor, wanted_A: Tensor, first: int) -> Tensor:
    """[A, D] rows of the global batch, of which this rank holds those from `first` on."""
    here_A = wanted_A - first
    own_A = (here_A >= 0) & (here_A < len(rows_BD))
    rows_AD: Tensor = rows_BD[here_A.clamp(0, len(rows_BD) - 1)] * own_A[:, None]
    return all_reduce_sum_(rows_AD.contiguous())


def _unit(rows_AD: Tensor) -> Tensor:
    unit_AD: Tensor = rows_AD / rows_AD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit_AD
