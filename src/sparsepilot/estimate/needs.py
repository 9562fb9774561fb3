"""An estimate put together: memory by part, disk, traffic, time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparsepilot.estimate import disk, memory, speed
from sparsepilot.estimate.devices import NODE_BANDWIDTH, Device, Efficiency
from sparsepilot.estimate.job import Dictionary, Job
from sparsepilot.estimate.parameters import optimizer_numbers
from sparsepilot.estimate.traffic import AMONG_LINES, messages
from sparsepilot.ops.select import SAMPLE_ROWS

FP32, INT64 = 4, 8


@dataclass
class Memory:
    """Bytes on one rank, by part."""

    lasting: dict[str, int] = field(default_factory=dict)
    """there in every step, from its beginning to its end"""
    passing: dict[str, int] = field(default_factory=dict)
    """parts of a step that are there one at a time: the largest counts"""
    at_end: int = 0
    """in their place, when training has ended: the dictionary for raw activations"""
    base: int = 0
    """the process, or the context on the device"""
    held_share: float = 0.0
    """of what comes and goes, what the allocator holds beyond it"""
    coming_and_going: int = 0
    """of the lasting parts, those that are made anew in each step"""

    @property
    def largest(self) -> int:
        """Of what passes in a step."""
        return max(self.passing.values(), default=0)

    @property
    def held(self) -> int:
        """In pieces that the next step cannot use."""
        return round(self.held_share * (self.coming_and_going + self.largest))

    @property
    def total(self) -> int:
        """At its fullest, in a step or at the end."""
        return sum(self.lasting.values()) + max(self.largest + self.held, self.at_end) + self.base

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "lasting": self.lasting,
            "passing": self.passing,
            "at_end": self.at_end,
            "held_by_allocator": self.held,
            "base": self.base,
            "total": self.total,
        }


class RankMemory(NamedTuple):
    """Memory of one rank's device, and of its host where the device has memory of its own."""

    device: Memory
    host: Memory | None


def rank_memory(job: Job) -> RankMemory:
    """The memory of one rank."""
    world, data = job.world, job.data
    kind = "cuda" if job.cuda else "cpu"
    on_device = Memory(held_share=memory.CUDA_HELD_SHARE if job.cuda else memory.HELD_SHARE)
    lasting = on_device.lasting
    local = [_local(job, d) for d in job.dictionaries]
    parameters = sum(one.numbers for one in local)
    state = sum(one.optimizer for one in local)
    lasting["parameters"] = FP32 * parameters
    lasting["gradients"] = FP32 * parameters
    lasting[f"optimizer ({job.optimizer})"] = FP32 * state
    # last firing and firing density; what the state dict has of tensors beside parameters
    lasting["counters"] = job.saved_buffer_bytes + sum(INT64 * one.latents for one in local)
    both = list(zip(job.dictionaries, local, strict=True))
    lasting["encoder product"] = sum(
        memory.workspace_bytes(
            job.rank_rows, one.whole_latents, d.width, half=d.half,
            certain_topk=d.architecture == "topk" and not job.mixed, readers=d.readers, device=kind,
            tile_latents=d.tile_latents,
        )
        for d, one in both
    )  # fmt: skip
    accumulated = sum(d.matrix_bytes // world.features for d in job.dictionaries) if job.micro_batches > 1 else 0
    passing = on_device.passing
    passing["active pairs and rows"] = accumulated + sum(_sparse(job, d, one, kind) for d, one in both)
    dense = sum(_dense(job, d, one, kind) for d, one in both if d.starts_dense)
    if dense:
        name = "dense path" if all(d.stays_dense for d in job.dictionaries) else "dense path, at the start"
        passing[name] = accumulated + dense
        if passing[name] == on_device.largest:
            lasting["encoder product"] -= sum(_empty_tile(job, d, one, kind) for d, one in both if d.starts_dense)
    aux = [_aux(job, d, one, kind) for d, one in both]
    if any(aux):
        passing[f"active pairs and rows, with AuxK where {job.dead:.0%} are dead"] = accumulated + sum(
            max(_sparse(job, d, one, kind), with_aux) for (d, one), with_aux in zip(both, aux, strict=True)
        )
    muon = job.newton_schulz > 0
    passing["clipping and optimizer"] = max(
        memory.optimizer_step_bytes(
            d.matrix_bytes if muon and world.kind == "fsdp" else one.matrix_bytes,  # Muon wants it whole
            projects=d.unit_decoder, muon=muon,
        )
        for d, one in both
    )  # fmt: skip
    lasting["traffic buffers"] = _traffic_buffers(job, local)
    own = {
        "shuffle window": memory.window_bytes(
            data.plan.num_train_rows if data.plan else 2**62, data.row_bytes, data.window_mb, data.num_streams,
            world.data_ranks,
        ),
        "batches read ahead": memory.batches_bytes(
            job.batch // job.accumulate // world.data_ranks, data.batch_row_bytes, data.prefetch_batches
        ),
    }  # fmt: skip
    folded = FP32 * sum(d.counts.matrices for d in job.dictionaries)
    block = max(memory.folding_bytes(d.matrix_bytes // FP32) for d in job.dictionaries)
    on_device.coming_and_going = lasting["gradients"]
    if not job.cuda:
        lasting.update(own)
        on_device.coming_and_going += own["batches read ahead"]
        on_device.base = job.process_bytes
        on_device.at_end = folded + block
        lasting["first steps"] = memory.FIRST_STEPS_BYTES
        return RankMemory(_tidy(on_device), None)
    on_device.base = memory.CUDA_BASE_BYTES
    on_device.at_end = block
    lasting["rows"] = 2 * (job.batch // job.accumulate // world.data_ranks) * data.batch_row_bytes
    host = Memory(lasting=own, at_end=folded, base=memory.HOST_BASE_BYTES)
    return RankMemory(_tidy(on_device), host)


def _tidy(parts: Memory) -> Memory:
    parts.lasting = {name: size for name, size in parts.lasting.items() if size}
    parts.passing = {name: size for name, size in parts.passing.items() if size}
    return parts


class _Local(NamedTuple):
    """One dictionary's part on a rank."""

    numbers: int
    """in parameters that stay there"""
    optimizer: int
    latents: int
    """whose state stays there"""
    whole_latents: int
    """that it multiplies with"""
    matrix_bytes: int
    """of the larger matrix, as the optimizer sees it"""
    gathered_bytes: int
    """of all parameters, as the step sees them"""


def _local(job: Job, d: Dictionary) -> _Local:
    world = job.world
    share = world.ranks if world.kind == "fsdp" else world.features
    whole = optimizer_numbers(d.counts, job.remembered)
    shared = d.counts.total - d.counts.per_latent
    if share == 1:
        return _Local(d.counts.total, whole, d.d_sae, d.d_sae, d.matrix_bytes, FP32 * d.counts.total)
    numbers = math.ceil(d.counts.per_latent / share) + (shared if world.kind == "feature_parallel" else shared // share)
    latents = d.d_sae // world.features
    return _Local(
        numbers, math.ceil(whole * numbers / d.counts.total), math.ceil(d.d_sae / share), latents,
        math.ceil(d.matrix_bytes / share), FP32 * d.counts.total // world.features,
    )  # fmt: skip


def _pairs(job: Job, d: Dictionary) -> float:
    """Per row on one rank; with shared latents about its share of them."""
    return max(d.pairs_per_row, d.first_pairs_per_row if not d.starts_dense else 0.0) / job.world.features


def _sparse(job: Job, d: Dictionary, one: _Local, kind: str) -> int:
    rows = job.rank_rows
    pairs = round(rows * _pairs(job, d))
    tall, _ = memory.tile_shape(rows, one.whole_latents, d.readers, 2 if d.half else 4, kind, d.tile_latents)
    if d.architecture == "topk":
        select = memory.topk_selection_bytes(
            tall, round(pairs / rows), one.whole_latents, half=d.half, certain=not job.mixed
        )
    else:
        batch_latents = one.whole_latents if d.architecture == "batchtopk" else 0
        select = memory.bound_selection_bytes(pairs, min(1.0, tall / rows), batch_latents)
    selecting = 2 * rows * d.d_in * FP32 + select
    step = memory.sparse_step_bytes(
        rows, d.d_in, d.d_out, pairs, same=d.same, reconstructions=d.reconstructions, wide=d.wide
    )
    norms = 0 if d.unit_decoder else one.matrix_bytes  # the gradient by way of decoder norms, beside the other
    return max(selecting, step + norms)


def _dense(job: Job, d: Dictionary, one: _Local, kind: str) -> int:
    return memory.dense_step_bytes(
        job.rank_rows, one.whole_latents, d.d_in, d.d_out, d.architecture, kind, one.matrix_bytes
    )


def _empty_tile(job: Job, d: Dictionary, one: _Local, kind: str) -> int:
    """Of the product's tile, what no step has filled while all are dense: a penalised model looks at a few rows only to
    see that it is."""
    if not d.penalised:
        return 0
    element = 2 if d.half else 4
    tall, wide = memory.tile_shape(job.rank_rows, one.whole_latents, d.readers, element, kind, d.tile_latents)
    return max(0, tall - SAMPLE_ROWS) * wide * element


def _aux(job: Job, d: Dictionary, one: _Local, kind: str) -> int:
    if d.aux_k is None:
        return 0
    rows, dead = job.rank_rows, round(job.dead * one.whole_latents)
    pairs, matrix_bytes = round(rows * _pairs(job, d)), d.matrix_bytes // job.world.features
    return memory.aux_k_bytes(rows, d.d_in, d.d_out, pairs, dead, d.aux_k, matrix_bytes, d.dense_above, kind)


def _traffic_buffers(job: Job, local: list[_Local]) -> int:
    world = job.world
    if world.ranks == 1:
        return 0
    if world.kind == "fsdp":
        return sum(memory.fsdp_bytes(one.gathered_bytes, world.ranks) for one in local)
    gradients = sum(FP32 * one.numbers for one in local)
    largest = max(one.matrix_bytes for one in local)
    ddp = memory.ddp_bytes(
        gradients, largest, world.data_ranks, bf16=world.bf16_gradients, reproducible=world.reproducible
    )
    if world.kind == "ddp":
        return ddp
    found = 0
    for d in job.dictionaries:  # candidates, a rank's own and those that it compares; one more reconstruction
        found += round(job.rank_rows * (2 * d.pairs_per_row * (FP32 + INT64) + d.d_out * FP32))
    return ddp + found


# ---------------------------------------------------------------------------------------------------- disk


def disk_needs(job: Job) -> dict[str, int]:
    """Bytes on disk, over all ranks together."""
    counts = [d.counts for d in job.dictionaries]
    numbers = job.parameters + sum(optimizer_numbers(c, job.remembered) for c in counts)
    each = disk.checkpoint_bytes(numbers, job.saved_buffer_bytes)
    found = {
        "one checkpoint": each,
        "checkpoints at most": disk.checkpoints_bytes(each, job.keep_last, job.keep_best),
        "the trained dictionary": FP32 * sum(c.total for c in counts),
    }
    if job.data.cache_bytes is not None:
        found["cache (there)"] = job.data.cache_bytes
    elif job.data.plan is not None:
        found["cache (to be built)"] = disk.cache_bytes(job.data.plan)
    return found


# ---------------------------------------------------------------------------------------------------- time


def step_work(job: Job) -> speed.Work:
    """What one rank does in a step once the run has settled."""
    total = speed.NOTHING
    for d in job.dictionaries:
        one = _local(job, d)
        rows = job.rank_rows
        if d.stays_dense:
            work = speed.dense_work(rows, one.whole_latents, d.width, d.d_out, mixed=job.mixed)
        else:
            pairs = round(rows * d.pairs_per_row / job.world.features)
            spare = rows * 32 if d.half and d.architecture == "topk" else 0
            work = speed.sparse_work(
                rows, one.whole_latents, d.width, d.d_out, pairs, half=d.half, spare_pairs=spare, wide=d.wide
            )
        total = total.plus(work.times(job.micro_batches))
        share = job.world.ranks if job.world.kind == "fsdp" else job.world.features
        shapes = [(-(-rows_ // share), columns) for rows_, columns in d.matrix_shapes]
        total = total.plus(speed.parameter_work(one.numbers, one.optimizer, shapes, job.newton_schulz))
    return total


def step_time(
    job: Job, device: Device, efficiency: Efficiency, node_bandwidth: float = NODE_BANDWIDTH
) -> speed.StepTime:
    """Seconds of a step on a device, by its data sheet."""
    between = min(device.link_bandwidth, node_bandwidth)
    in_machine = job.world.nodes == 1
    lines_in_machine = job.world.features <= job.world.ranks // job.world.nodes
    links_s = 0.0
    for message in messages(job):
        in_line = message.what not in AMONG_LINES and job.world.features > 1
        inside = in_machine or (in_line and lines_in_machine)
        links_s += message.sent_bytes / (device.link_bandwidth if inside else between)
    return speed.roofline(step_work(job), links_s, job.micro_batches, device, efficiency)
