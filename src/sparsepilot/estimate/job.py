"""What the formulas read: the dictionaries of a configuration, its data, and the ranks it would run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.revival import AuxK
from sparsepilot.autoencoders.topk import MULTI
from sparsepilot.config.check import check
from sparsepilot.config.instantiate import instantiate
from sparsepilot.errors import ConfigError
from sparsepilot.estimate.dry import dry_module
from sparsepilot.estimate.memory import resident_bytes
from sparsepilot.estimate.parameters import Counts, Remembered, count, remembered
from sparsepilot.estimate.rows import Data, read_data
from sparsepilot.estimate.wanted import Wanted
from sparsepilot.estimate.world import World, read_world
from sparsepilot.ops.product import has_fast_half
from sparsepilot.training.module import TrainingModule
from sparsepilot.training.trainee import Trainee

ASSUMED_L0 = 64.0
"""Of a model with a sparsity penalty where nobody says what it will come to."""


class Dictionary(NamedTuple):
    """One dictionary of a run."""

    name: str
    architecture: str
    d_in: int
    d_out: int
    width: int
    """inputs of one latent"""
    readers: int
    d_sae: int
    same: bool
    counts: Counts
    matrix_shapes: tuple[tuple[int, int], ...]
    penalised: bool
    pairs_per_row: float
    """that a step touches, once sparse"""
    first_pairs_per_row: float
    """at the start of a run, where k falls"""
    starts_dense: bool
    stays_dense: bool
    reconstructions: int
    wide: bool
    """it has a second reconstruction"""
    aux_k: int | None
    unit_decoder: bool
    half: bool
    dense_above: float
    tile_latents: int | None

    @property
    def matrix_bytes(self) -> int:
        """Of the larger of its matrices."""
        return 4 * max(rows * columns for rows, columns in self.matrix_shapes)


@dataclass(frozen=True)
class Job:
    """Everything that an estimate is made of."""

    dictionaries: tuple[Dictionary, ...]
    remembered: Remembered
    optimizer: str
    newton_schulz: int
    saved_buffer_bytes: int
    """of the module's state beside parameters"""
    world: World
    data: Data
    batch: int
    accumulate: int
    samples: int
    mixed: bool
    cuda: bool
    keep_last: int
    keep_best: int
    dead: float
    process_bytes: int
    """of a process that has imported what a run does, on CPU"""
    notes: tuple[str, ...]

    @property
    def rank_rows(self) -> int:
        """B: rows of a micro-batch on one rank; with trainer.reproducible, of one stream."""
        rows = self.batch // self.accumulate // self.world.data_ranks
        return rows * self.world.data_ranks // self.data.num_streams if self.world.reproducible else rows

    @property
    def micro_batches(self) -> int:
        """Forward passes of a step on one rank."""
        if self.world.reproducible:
            return self.data.num_streams // self.world.data_ranks
        return self.accumulate

    @property
    def parameters(self) -> int:
        """Of all dictionaries."""
        return sum(d.counts.total for d in self.dictionaries)


def read_job(cfg: DictConfig, wanted: Wanted) -> Job:
    """Reads a configuration; neither the devices nor the cache need to be there.

    Raises:
        SparsepilotError: what train.py would say of it, and what cannot be known without being told.
    """
    process_bytes = resident_bytes()  # before anything is built
    cfg = _completed(cfg, wanted)
    world = read_world(cfg, wanted)
    alone = cfg.copy()
    OmegaConf.update(alone, "trainer.devices", 1, force_add=True)
    OmegaConf.update(alone, "trainer.num_nodes", 1, force_add=True)
    check(alone)
    data = read_data(cfg, wanted)
    cuda = wanted.device is not None or cfg.trainer.get("accelerator") in ("gpu", "cuda")
    mixed = str(cfg.trainer.get("precision", "32-true")) == "bf16-mixed"
    _check_streams(world, data)
    module = dry_module(cfg, data.widths)
    l0, notes = _settled_l0(cfg, module, wanted)
    dictionaries = tuple(
        _dictionary(prefix.rstrip("/") or "sae", trainee, l0, cuda, mixed) for prefix, trainee in module.each()
    )
    for d in dictionaries:
        if d.d_sae % world.features:
            raise ConfigError(
                f"model.d_sae = {d.d_sae}: must be a multiple of {world.features}, the ranks that share the latents"
            )
    state = module.state_dict()
    parameters = {name for name, _ in module.named_parameters()}
    buffers = [tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and name not in parameters]
    saved = sum(tensor.numel() * tensor.element_size() for tensor in buffers)
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    return Job(
        dictionaries=dictionaries,
        remembered=remembered(optimizer),
        optimizer=str(cfg.optimizer._target_).rpartition(".")[2],
        newton_schulz=int(cfg.optimizer.get("ns_steps", 0)),
        saved_buffer_bytes=saved,
        world=world,
        data=data,
        batch=int(cfg.batch),
        accumulate=int(cfg.accumulate),
        samples=int(cfg.samples),
        mixed=mixed,
        cuda=cuda,
        keep_last=int(cfg.callbacks.keep_last),
        keep_best=int(cfg.callbacks.keep_best),
        dead=wanted.dead,
        process_bytes=process_bytes,
        notes=(*data.notes, *notes),
    )


def _completed(cfg: DictConfig, wanted: Wanted) -> DictConfig:
    """Where the width is given, data need no place of their own."""
    cfg = cfg.copy()
    if wanted.d_in is not None:
        for name, value in (("path", "(not there yet)"), ("sites", ["site"])):
            if OmegaConf.is_missing(cfg.data, name):
                OmegaConf.update(cfg, f"data.{name}", value)
    return cfg


def _check_streams(world: World, data: Data) -> None:
    streams = data.num_streams
    if streams % world.data_ranks:
        allowed = ", ".join(str(w) for w in range(1, streams + 1) if streams % w == 0)
        raise ConfigError(
            f"devices = {world.ranks}: {world.data_ranks} ranks with rows of their own cannot share data.num_streams = "
            f"{streams} equally; so many can: {allowed}"
        )


def _settled_l0(cfg: DictConfig, module: TrainingModule, wanted: Wanted) -> tuple[float, list[str]]:
    """Active latents per row of a model with a penalty at the end of its run."""
    if wanted.l0 is not None:
        return float(wanted.l0), []
    target = cfg.controller.get("target_l0")
    if target is not None:
        return float(target), []
    if any(trainee.autoencoder.knob.kind == "penalty" for _, trainee in module.each()):
        return ASSUMED_L0, [
            f"an L0 of {ASSUMED_L0:g} is assumed, nobody knows it before training; l0=... says otherwise"
        ]
    return ASSUMED_L0, []


def _dictionary(name: str, trainee: Trainee, l0: float, cuda: bool, mixed: bool) -> Dictionary:
    sae: Autoencoder = trainee.autoencoder
    shapes = [tuple(p.shape) for p in sae.parameters()]
    penalised = sae.knob.kind == "penalty"
    k = l0 if penalised else float(trainee.controller.strength)
    wide = bool(sae.extra_terms)
    multiple = MULTI if not penalised and wide else 1
    first_k = max(k, float(getattr(sae, "anneal_k_from", None) or 0))
    limit = sae.dense_above * sae.d_sae
    aux_k = None
    if isinstance(sae.revival, AuxK):
        aux_k = sae.revival.aux_k or math.ceil(sae.d_out / 2)
    half = sae.half_product if sae.half_product is not None else (cuda or has_fast_half(torch.device("cpu")))
    return Dictionary(
        name=name,
        architecture=sae.architecture,
        d_in=sae.d_in,
        d_out=sae.d_out,
        width=sae.blocks.encoder_width,
        readers=sae.blocks.readers,
        d_sae=sae.d_sae,
        same=sae.blocks.same,
        counts=count(shapes, sae.d_sae),
        matrix_shapes=tuple((s[0], s[1]) for s in shapes if len(s) == 2),
        penalised=penalised,
        pairs_per_row=min(sae.d_sae, k * multiple),
        first_pairs_per_row=min(sae.d_sae, first_k * multiple),
        starts_dense=penalised or first_k * multiple > limit,
        stays_dense=k * multiple > limit,
        reconstructions=1 if sae.prefixes is None else len(sae.prefixes.ends(sae.d_sae, 0, 0)),
        wide=wide,
        aux_k=aux_k,
        unit_decoder=sae.unit_decoder,
        half=bool(half) or mixed,
        dense_above=sae.dense_above,
        tile_latents=sae.tile_latents,
    )
