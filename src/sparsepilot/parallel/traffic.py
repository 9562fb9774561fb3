"""What ranks send each other in an optimizer step, by formula; tests/distributed/test_traffic.py counts it.

P numbers of parameters, of which each latent has `per_latent`; B rows of the global batch; n ranks.

    data_parallel     the gradient is added up                                   2 (n-1)/n P
    fully_sharded     the dictionary is gathered, its gradient dealt out again    2 (n-1)/n P
    feature_parallel  n = lines x shards; a line has B / lines rows, a column d_sae / shards latents
                      in a line: candidates, reconstructions                     (s-1)/s B / lines (2 D + K)
                      in a column: the gradient of its latents                    2 (l-1)/l P / shards

The first two grow with d_sae whatever the batch. In the third only the columns' part does, and it is divided by the
number of shards; with one line there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sparsepilot.parallel.collectives import SMALL

Kind = Literal["all_reduce", "all_gather", "all_to_all", "reduce_scatter"]
FP32, BF16, FP64, INT64, INT32 = 4, 2, 8, 8, 4


class Message(NamedTuple):
    """One collective, some times in a step."""

    what: str
    kind: Kind
    num_bytes: int
    """that a rank gives to it: all of its tensor"""
    ranks: int
    times: int = 1

    @property
    def sent_bytes(self) -> float:
        """What a rank sends, with the ring algorithms that gloo and NCCL use for large messages (where a rank receives
        as much as it sends)."""
        n = self.ranks
        per_time = {
            "all_reduce": 2 * (n - 1) / n * self.num_bytes,
            "all_gather": (n - 1) * self.num_bytes,
            "all_to_all": (n - 1) / n * self.num_bytes,
            "reduce_scatter": (n - 1) / n * self.num_bytes,
        }
        return self.times * per_time[self.kind]


class Work(NamedTuple):
    """What the traffic of a step hangs on, whatever the trainer. Of a TopK autoencoder, unless more is said."""

    batch: int
    """rows of the global batch"""
    d_in: int
    d_out: int
    d_sae: int
    k: int
    """candidates per row that shards compare: k, or 4k with multi_topk; 0 where latents are active above a threshold"""
    aux_k: int = 0
    """the same for AuxK: min(aux_k, dead latents), or 0 where no latent is dead"""
    selections: int = 1
    """how many k are compared: 2 with multi_topk"""
    reconstructions: int = 1
    """per row: of the whole dictionary, of each prefix before it, of multi_topk or the gate"""
    per_latent: int | None = None
    """numbers of a latent's parameters; None: an encoder row, a bias, a decoder row"""
    num_terms: int = 2
    """loss terms and measures that are logged"""
    accumulate: int = 1

    @property
    def latent_numbers(self) -> int:
        """Numbers of all latents' parameters."""
        return self.d_sae * (self.per_latent or self.d_in + self.d_out + 1)

    @property
    def rows(self) -> int:
        """Of a micro-batch, over all ranks."""
        return self.batch // self.accumulate


def data_parallel(work: Work, ranks: int, gradient_bytes: int = FP32) -> list[Message]:
    """Every rank has the whole dictionary (`trainer=ddp`); gradients travel as fp32 or bf16."""
    return [
        Message("gradients", "all_reduce", gradient_bytes * (work.latent_numbers + work.d_out), ranks),
        *_measurements(work, work.d_sae, ranks),
    ]


def fully_sharded(work: Work, ranks: int) -> list[Message]:
    """Every rank keeps a part and gathers the whole for each micro-batch (`trainer=fsdp`).

    (A part is padded where `ranks` does not divide d_sae or d_out; that is left out here.)
    """
    numbers = work.latent_numbers + work.d_out
    return [
        Message("dictionary", "all_gather", FP32 * numbers // ranks, ranks, work.accumulate),
        Message("gradients", "reduce_scatter", FP32 * numbers, ranks, work.accumulate),
        Message("norm of the gradient", "all_gather", FP64 * 4, ranks),
        *_measurements(work, work.d_sae, ranks),
    ]


def feature_parallel(work: Work, lines: int, shards: int, gradient_bytes: int = FP32) -> list[Message]:
    """Each of `shards` ranks of a line has its part of the latents, each of `lines` lines its part of the rows
    (`trainer=feature_parallel`, `trainer.strategy.features=shards`).

    A step on active latents. A dense one decodes again in the backward pass, so that candidates and reconstructions
    travel twice.
    """
    rows, times = work.rows // lines, work.accumulate
    own_latents = work.d_sae // shards
    messages = [
        *_compared("candidates", rows, min(work.k, own_latents), work.selections, shards, times),
        *_summed("reconstructions", rows * work.d_out, shards, times * work.reconstructions),
        *_summed("gradient of b_in", work.d_in, shards, times),
        *_summed("number of dead latents", 1, shards, times, INT64),
    ]
    if work.aux_k:
        messages += [
            *_compared("candidates of AuxK", rows, min(work.aux_k, own_latents), 1, shards, times),
            *_summed("reconstructions of AuxK", rows * work.d_out, shards, times),
            *_summed("gradient of b_in from AuxK", work.d_in, shards, times),
        ]
    messages += [
        *_summed("active latents", 1, shards, 1, FP64),
        *_summed("norm of the gradient", 1, shards, 1, FP64),
    ]
    if lines > 1:
        gradient = gradient_bytes * (work.latent_numbers // shards + work.d_out)
        messages.append(Message("gradients", "all_reduce", gradient, lines))
    return messages + _measurements(work, own_latents, lines)


def sent_bytes(messages: Sequence[Message]) -> float:
    """What a rank sends in a step."""
    return sum(message.sent_bytes for message in messages)


def _measurements(work: Work, own_latents: int, ranks: int) -> list[Message]:
    """Sums of loss terms, and when each latent last fired, among the ranks that have the same latents."""
    if ranks == 1:
        return []
    fired = Message("last firings", "all_reduce", INT64 * own_latents, ranks)
    return [*_summed("loss terms", 4 + work.num_terms, ranks, 1, FP64), fired]


def _summed(what: str, numbers: int, ranks: int, times: int, num_bytes: int = FP32) -> list[Message]:
    """As `collectives.all_reduce_sum_` does it."""
    if ranks == 1 or numbers == 0:
        return []
    kind: Kind = "all_gather" if numbers <= SMALL else "all_reduce"
    return [Message(what, kind, num_bytes * numbers, ranks, times)]


def _compared(what: str, rows: int, candidates: int, selections: int, ranks: int, times: int) -> list[Message]:
    """As `ops.among_shards.among_all` does it: candidates to who compares them, and back how many stay."""
    if ranks == 1 or candidates == 0:
        return []
    padded = -(-rows // ranks) * ranks
    return [
        Message(what, "all_to_all", FP32 * padded * candidates, ranks, times),
        Message(f"{what}: how many stay", "all_to_all", INT32 * padded * selections, ranks, times),
    ]
