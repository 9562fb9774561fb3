"""The messages of a job's ranks in an optimizer step; parallel/traffic.py has the formulas, and what counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsepilot.parallel import traffic
from sparsepilot.parallel.traffic import Message, Work

if TYPE_CHECKING:
    from sparsepilot.estimate.job import Dictionary, Job

AMONG_LINES = ("gradients", "last firings", "loss terms")
"""Of feature_parallel's messages, those between ranks that hold the same latents and read different rows."""


def messages(job: Job) -> list[Message]:
    """All of them, dictionary after dictionary; none where there is one rank."""
    return [message for d in job.dictionaries for message in _of_dictionary(job, d)]


def sent_per_step(job: Job) -> dict[str, float]:
    """Bytes that a rank sends, by what they are."""
    found: dict[str, float] = {}
    for message in messages(job):
        found[message.what] = found.get(message.what, 0.0) + message.sent_bytes
    return found


def _of_dictionary(job: Job, d: Dictionary) -> list[Message]:
    world = job.world
    if world.ranks == 1:
        return []
    work = Work(
        batch=job.batch,
        d_in=d.d_in,
        d_out=d.d_out,
        d_sae=d.d_sae,
        k=0 if d.penalised else round(d.pairs_per_row),
        aux_k=0 if d.aux_k is None else min(d.aux_k, round(job.dead * d.d_sae)),
        selections=2 if d.wide and not d.penalised else 1,
        reconstructions=d.reconstructions + d.wide,
        per_latent=d.counts.per_latent // d.d_sae,
        accumulate=job.accumulate,
    )
    if world.kind == "fsdp":
        return traffic.fully_sharded(work, world.ranks)
    gradient_bytes = traffic.BF16 if world.bf16_gradients else traffic.FP32
    if world.kind == "feature_parallel":
        return traffic.feature_parallel(work, world.data_ranks, world.features, gradient_bytes)
    found = traffic.data_parallel(work, world.ranks, gradient_bytes)
    if not world.reproducible:
        return found
    # in a fixed tree, every rank adds up everybody's gradients itself
    return [m._replace(kind="all_gather") if m.what == "gradients" else m for m in found]
