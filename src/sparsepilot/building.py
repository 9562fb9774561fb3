"""From a configuration to what it describes: data, dictionaries and their controllers, Lightning's Trainer."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.console import Console

from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.caching import build_cache, check_recipe, is_sealed
from sparsepilot.callbacks.checkpoint import CrashSafeCheckpoint
from sparsepilot.callbacks.checkpoint_io import CrashSafeIO
from sparsepilot.callbacks.disturb import Disturb
from sparsepilot.callbacks.progress import ProgressLine
from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.callbacks.stop import StopAtStep, leave_signals_alone
from sparsepilot.callbacks.validate import ValidateEvery
from sparsepilot.config.check import LIVE
from sparsepilot.config.instantiate import instantiate
from sparsepilot.config.plain import plain_values
from sparsepilot.config.signature import takes
from sparsepilot.config.trainees import each_alone, naming
from sparsepilot.controllers.base import Controller
from sparsepilot.controllers.closed_loop import refuse_without_held_out
from sparsepilot.data.datamodule import RunData
from sparsepilot.data.files import one_at_a_time
from sparsepilot.errors import ConfigError
from sparsepilot.interop import dictionary
from sparsepilot.parallel import agreement, mesh
from sparsepilot.parallel.ddp import DataParallel
from sparsepilot.parallel.latents import Shard
from sparsepilot.ranks import ranks_here
from sparsepilot.run_folder import RunFolder
from sparsepilot.starting import Origin, begin_from, load_origin
from sparsepilot.training.module import Schedule, TrainingModule
from sparsepilot.training.trainee import Sites, Trainee
from sparsepilot.training.validation import CrossEntropy, Validation
from sparsepilot.wiring import STARTING, WIRING, wire

NO_LIGHTNING_VALIDATION = 2**62  # batches; ValidateEvery decides instead


def build_data(cfg: DictConfig, console: Console) -> RunData:
    """The datamodule; a cache that is not there yet is built first, where the configuration says how."""
    values = plain_values(cfg)
    node = dict(values["data"])
    recipe = node.pop("build", None)
    check_recipe(values["data"], values["lm"], values["text"])

    def build() -> None:
        if recipe is None or is_sealed(Path(node["path"])):
            return
        say = functools.partial(console.print, highlight=False)
        # the members of a sweep all want the same one
        with one_at_a_time(Path(node["path"]), lambda: say(f"waiting for another process that builds {node['path']}")):
            if not is_sealed(Path(node["path"])):
                say(f"building the activation cache {node['path']}")
                build_cache(values["data"], values["lm"], values["text"], console=console)

    agreement.from_first(build)
    given = {"batch": cfg.batch, "accumulate": cfg.accumulate, "total_samples": total_of(cfg), "seed": cfg.seed}
    live = {"lm": values["lm"], "text": values["text"], "folder": cfg.run_dir, "say": console.print}
    given |= {name: live[name] for name in takes(node, *LIVE)}
    return cast(RunData, instantiate(node, **given, _convert_="all", _recursive_=False))


def build_module(cfg: DictConfig, data: RunData) -> TrainingModule:
    """The LightningModule with its trainees, each begun with the draws that it would begin with alone."""
    trainees: dict[str, Trainee] = {}
    validations: dict[str, Validation] = {}
    schedules: dict[str, Schedule] = {}
    measurements: dict[Any, Any] = {}
    for name, alone in each_alone(cfg).items():
        with naming(cfg, name):
            torch.manual_seed(alone.seed)
            schedules[name] = instantiate(alone.schedule, _convert_="all")
            trainee = trainees[name] = build_trainee(alone, data, schedules[name])
            refuse_without_held_out(trainee.controller, data.cache.num_val_rows)
            cross_entropy = build_cross_entropy(alone, data, trainee.sites, measurements)
            planted_TD = data.cache.planted_features()
            validations[name] = Validation(trainee, data.cache.num_train_rows, planted_TD, cross_entropy)
    return TrainingModule(
        trainees=trainees,
        validations=validations,
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        schedules=schedules,
        batch=cfg.batch,
        total_samples=total_of(cfg),
        clip_norm=cfg.clip_norm,
        log_every_steps=cfg.callbacks.log_every_steps,
        reproducible=cfg.trainer.get("reproducible", False),
    )


def build_trainee(cfg: DictConfig, data: RunData, schedule: Schedule) -> Trainee:
    """A dictionary and its controller."""
    total_samples = total_of(cfg)
    model = plain_values(cfg)["model"]
    wired = wire(data, **{name: model.pop(name) for name in WIRING if name in model})
    model = {name: value for name, value in model.items() if name not in STARTING}
    # a partial: Hydra would turn a dataclass among the arguments into a configuration node
    autoencoder: Autoencoder = instantiate({**model, "_partial_": True})(
        blocks=wired.blocks, shard=Shard(model["d_sae"], mesh.features())
    )
    if autoencoder.architecture not in dictionary.OWN_TENSORS:
        raise ConfigError(
            f"model: {autoencoder.architecture!r} could be trained but not loaded again; say in interop/dictionary.py "
            "which tensors it has and how it encodes"
        )
    if cfg.compile:
        autoencoder.compile()
    controller: Controller = instantiate(cfg.controller, _convert_="all")
    return Trainee(
        autoencoder, controller, wired.sites, total_samples, cfg.batch, cfg.seed, lambda at: schedule(at, total_samples)
    )


def build_cross_entropy(cfg: DictConfig, data: RunData, sites: Sites, shared: dict[Any, Any]) -> CrossEntropy | None:
    """The measurement of the language model with the reconstruction spliced in, where it is asked for; `shared` by
    trainees where it can be."""
    values = plain_values(cfg)
    if values["cross_entropy"] is None:
        return None
    make = instantiate({**values["cross_entropy"], "_partial_": True})
    return cast(CrossEntropy, make(data=data, sites=sites, lm=values["lm"], shared=shared))


def load_origins(cfg: DictConfig) -> dict[str, Origin]:
    """What each trainee's `model.init_from` names, where it names anything."""
    origins = {}
    for name, alone in each_alone(cfg).items():
        with naming(cfg, name):
            origin = load_origin(alone.model.get("init_from"))
        if origin is not None:
            origins[name] = origin
    return origins


def begin_from_origins(origins: dict[str, Origin], module: TrainingModule, cfg: DictConfig, console: Console) -> None:
    """Gives fresh trainees the weights that `model.init_from` names, and says what is different about them."""
    for name, origin in origins.items():
        with naming(cfg, name):
            notes = begin_from(origin, cast(Trainee, module.trainees[name]))
        for note in notes:
            console.print(f"{f'trainees.{name}.' if cfg.trainees else ''}model.init_from: {note}", highlight=False)


def build_trainer(cfg: DictConfig, folder: RunFolder, log: RunLog, console: Console, samples: int) -> L.Trainer:
    """Lightning's Trainer with this project's callbacks, in the order in which they act on a step."""
    total_samples = total_of(cfg)
    when = cfg.callbacks
    checkpoint = CrashSafeCheckpoint(
        folder.checkpoints,
        log,
        every_minutes=when.checkpoint_every_minutes,
        every_samples=when.checkpoint_every_samples,
        keep_last=when.keep_last,
        keep_best=when.keep_best,
        monitor=when.best_by,
    )
    callbacks: list[L.Callback] = [
        log,
        *(
            [Disturb(**{**when.disturb, "at": int(when.disturb["at"] * total_samples)}, total_samples=total_samples)]
            if when.disturb
            else []
        ),
        ValidateEvery(
            when.validate_every_samples or max(cfg.batch, total_samples // 20),
            log,
            cfg.cross_entropy.every_samples if cfg.cross_entropy else None,
        ),
        ProgressLine(log, console),
        checkpoint,
        StopAtStep(checkpoint, folder),
    ]
    # ranks.py knows who started the ranks; Lightning is told in torchrun's way. (Its own Slurm environment saves inside
    # a signal handler, in the middle of a step.)
    environment = LightningEnvironment() if ranks_here() is None else TorchElasticEnvironment()
    plugins: list[Any] = [CrashSafeIO(), environment]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        trainer = cast(
            L.Trainer,
            instantiate(
                {key: value for key, value in plain_values(cfg)["trainer"].items() if key != "reproducible"},
                callbacks=callbacks,
                plugins=plugins,
                logger=build_loggers(cfg, samples),
                max_epochs=1,
                accumulate_grad_batches=cfg.accumulate,
                val_check_interval=NO_LIGHTNING_VALIDATION,
                check_val_every_n_epoch=None,
                num_sanity_val_steps=0,
                deterministic=True,
                use_distributed_sampler=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
            ),
        )
    leave_signals_alone(trainer)
    if ranks_here() is not None:
        # Lightning's own goes over the group of the devices, whose clock (10 minutes with NCCL, 30 with gloo) would end
        # a run while rank 0 writes a large checkpoint
        trainer.strategy.barrier = lambda *args, **kwargs: agreement.meet()  # type: ignore[method-assign]
    if isinstance(trainer.strategy, DataParallel):
        trainer.strategy.reproducible = cfg.trainer.get("reproducible", False)
    return trainer


def build_loggers(cfg: DictConfig, samples: int) -> list[Logger]:
    """Lightning loggers beside metrics.jsonl, each process's own files in a version named by where it began.

    (Lightning's CSV logger wipes its file when it opens one again.) W&B is not one of them, see reporting/wandb.py.
    """
    nodes = [node for node in (cfg.logger or {}).values() if "_target_" in node]
    return [instantiate(node, version=f"from-{samples}") for node in nodes]


def whole_batches(samples: int, batch: int) -> int:
    """Samples, rounded up to whole batches."""
    return -(-samples // batch) * batch


def total_of(cfg: DictConfig) -> int:
    """The budget in whole batches."""
    return whole_batches(int(cfg.samples), int(cfg.batch))
