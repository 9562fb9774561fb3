"""The one place where the halves of a run meet: configuration, cache, model, Lightning, run folder."""

from __future__ import annotations

import logging
import os
import resource
import time
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sparsepilot import faults
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.caching import build_cache, is_sealed
from sparsepilot.callbacks.checkpoint import CrashSafeCheckpoint
from sparsepilot.callbacks.checkpoint_io import CrashSafeIO, list_checkpoints, newest_whole
from sparsepilot.callbacks.progress import ProgressLine
from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.callbacks.stop import StopAtStep
from sparsepilot.callbacks.validate import ValidateEvery
from sparsepilot.config.check import check
from sparsepilot.config.instantiate import instantiate
from sparsepilot.config.resume import allowed_changes
from sparsepilot.controllers.base import Controller
from sparsepilot.data.datamodule import ActivationData
from sparsepilot.errors import CheckpointError
from sparsepilot.interop import dictionary
from sparsepilot.reporting.environment import environment
from sparsepilot.reporting.summary import print_end, print_sizes
from sparsepilot.reporting.wandb import LiveRun, resolve_mode, write_offline_run
from sparsepilot.rows import read_rows
from sparsepilot.run_folder import RunFolder, replacing, write_json
from sparsepilot.training.module import TrainingModule
from sparsepilot.training.trainee import InputStats, Trainee
from sparsepilot.training.validation import Validation

NO_LIGHTNING_VALIDATION = 2**62  # batches; ValidateEvery decides instead


def train(cfg: DictConfig, console: Console | None = None) -> dict[str, Any]:
    """Trains what `cfg` describes, or goes on with it, and returns the summary that it also writes.

    Raises:
        SparsepilotError: on any bad input, before something is built where that is possible.
    """
    console = console or Console(soft_wrap=True)  # a path is never broken in two
    check(cfg)
    prepare_process(cfg)
    folder, resumed = claim(cfg, console)
    faults.point("resume-claimed")
    data = build_data(cfg, console)
    if cfg.check:
        sizes = measure_sizes(build_module(cfg, data), data)
        print_sizes(console, sizes)
        return dict(sizes)
    if resumed is not None:
        data.start_sample = resumed[0]
    module = build_module(cfg, data)
    record_start(cfg, folder, data.cache.fingerprint)
    wandb_node = (cfg.logger or {}).get("wandb")
    wandb_mode = resolve_mode(wandb_node.mode) if wandb_node else "disabled"
    live = LiveRun(folder, plain(cfg)["logger"]["wandb"], environment()) if wandb_mode == "online" else None
    log = RunLog(
        folder,
        samples=data.start_sample,
        waited_s=lambda: _waited_s(trainer),
        after_checkpoint=live.after_checkpoint if live else _nothing,
    )
    trainer = build_trainer(cfg, folder, log, console)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed[1] if resumed else None, weights_only=True)
    finally:
        log.close()
        if live:
            live.close()
    if wandb_mode == "offline":
        write_offline_run(folder, plain(cfg)["logger"]["wandb"], environment())
    return finish(folder, module, data, console)


# ---------------------------------------------------------------------------------------------------- before a run


def prepare_process(cfg: DictConfig) -> None:
    """Seeds, threads, deterministic kernels, and libraries that keep quiet."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(True)
    # filling every fresh tensor would cost more than the sparse step; no kernel here reads memory that it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    L.seed_everything(cfg.seed, verbose=False)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 asks torch 2.13 about its tree type in the old way; nothing that a user could act on
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")


def claim(cfg: DictConfig, console: Console) -> tuple[RunFolder, tuple[int, Path] | None]:
    """The run folder, and the checkpoint to go on from where it holds a run already.

    Raises:
        ConfigError: when the configuration there is that of another run.
        CheckpointError: when it has checkpoints and every one is damaged.
    """
    folder = RunFolder(cfg.run_dir)
    if cfg.check or not folder.exists():
        return folder, None
    if cfg.resume.value == "never":
        number = 2
        while (fresh := RunFolder(f"{cfg.run_dir}-{number}")).exists():
            number += 1
        console.print(f"{folder.path} holds a run; starting a fresh one in {fresh.path}", highlight=False)
        return fresh, None
    was = OmegaConf.to_container(OmegaConf.load(folder.config))
    changes = allowed_changes(cast(dict[str, Any], was), plain(cfg))
    resumed = newest_whole(folder.checkpoints, say=lambda text: console.print(f"warning: {text}", highlight=False))
    if resumed is None and list_checkpoints(folder.checkpoints):
        raise CheckpointError(f"{folder.checkpoints}: every checkpoint is damaged; resume=never begins anew beside it")
    samples = resumed[0] if resumed else 0
    console.print(f"resuming {folder.path} at {samples:,} samples", highlight=False)
    for change in changes:
        console.print(f"  changed: {change}", highlight=False)
    return folder, resumed


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))


def record_start(cfg: DictConfig, folder: RunFolder, cache_fingerprint: str) -> None:
    """Writes config.yaml (keeping the one before, where it changed) and run.json."""
    folder.path.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(plain(cfg)))
    if folder.exists() and (before := folder.config.read_text(encoding="utf-8")) != text:
        folder.older_config().write_text(before, encoding="utf-8")
    if not folder.identity.exists():
        made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        identity = {"id": os.urandom(4).hex(), "made": made, "cache_fingerprint": cache_fingerprint}
        write_json(folder.identity, identity)
    with replacing(folder.config) as file:
        file.write(text)
        faults.point("config-write")


# ---------------------------------------------------------------------------------------------------- building


def build_data(cfg: DictConfig, console: Console) -> ActivationData:
    """The datamodule; a cache that is not there yet is built first, where the configuration says how."""
    values = plain(cfg)
    node = dict(values["data"])
    recipe = node.pop("build", None)
    if recipe is not None and not is_sealed(Path(node["path"])):
        console.print(f"building the activation cache {node['path']}", highlight=False)
        build_cache(values["data"], values["lm"], values["text"], console=console)
    return cast(
        ActivationData,
        instantiate(
            node, batch=cfg.batch, accumulate=cfg.accumulate, total_samples=_total(cfg), seed=cfg.seed, _convert_="all"
        ),
    )


def _total(cfg: DictConfig) -> int:
    """The budget in whole batches, rounded up."""
    return -(-int(cfg.samples) // int(cfg.batch)) * int(cfg.batch)


def build_module(cfg: DictConfig, data: ActivationData) -> TrainingModule:
    """The LightningModule with its trainees."""
    total_samples = _total(cfg)
    stats = [data.cache.stats(site) for site in data.sites]
    inputs = InputStats(
        mean_D=torch.cat([s.mean_D for s in stats]),
        variance_D=torch.cat([s.variance_D for s in stats]),
        scale=(data.d_in / sum(s.mean_sq_norm for s in stats)) ** 0.5,
    )
    autoencoder: Autoencoder = instantiate(cfg.model, d_in=data.d_in)
    controller: Controller = instantiate(cfg.controller)
    trainee = Trainee(autoencoder, controller, inputs, slice(0, data.d_in), total_samples)
    validation = Validation(trainee, data.cache.num_train_rows, data.cache.planted_features())
    return TrainingModule(
        trainees={"sae": trainee},
        validations={"sae": validation},
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        schedule=instantiate(cfg.schedule, _convert_="all"),
        batch=cfg.batch,
        total_samples=total_samples,
        clip_norm=cfg.clip_norm,
        log_every_steps=cfg.callbacks.log_every_steps,
    )


def build_trainer(cfg: DictConfig, folder: RunFolder, log: RunLog, console: Console) -> L.Trainer:
    """Lightning's Trainer with this project's callbacks, in the order in which they act on a step."""
    total_samples = _total(cfg)
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
        ValidateEvery(when.validate_every_samples or max(cfg.batch, total_samples // 20)),
        ProgressLine(log, console),
        checkpoint,
        StopAtStep(checkpoint),
    ]
    plugins: list[Any] = [CrashSafeIO()]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing saves inside the signal handler, in the middle of a step
        plugins.append(SLURMEnvironment(auto_requeue=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        return cast(
            L.Trainer,
            instantiate(
                cfg.trainer,
                callbacks=callbacks,
                plugins=plugins,
                logger=build_loggers(cfg),
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


def build_loggers(cfg: DictConfig) -> list[Logger]:
    """Lightning loggers beside metrics.jsonl; W&B is not one of them, see reporting/wandb.py."""
    return [instantiate(node) for node in (cfg.logger or {}).values() if "_target_" in node]


# ---------------------------------------------------------------------------------------------------- after a run


def finish(folder: RunFolder, module: TrainingModule, data: ActivationData, console: Console) -> dict[str, Any]:
    """Writes the trained dictionary and summary.json, prints the table."""
    trainee = cast(Trainee, module.trainees["sae"])
    autoencoder = trainee.autoencoder
    cfg_out = {
        **autoencoder.inference_config(),
        "sites": data.sites,
        "samples": module.samples,
        "cache_fingerprint": data.cache.fingerprint,
        "source": data.cache.manifest.plan.source,
        "input_scale_in_training": trainee.scale,
    }
    dictionary.save(folder.path, cfg_out, autoencoder.inference_tensors(), trainee.scale)
    faults.point("finish-dictionary")
    summary = summarise(folder, module)
    write_json(folder.summary, summary)
    print_end(console, folder, summary, autoencoder.d_sae)
    return summary


def summarise(folder: RunFolder, module: TrainingModule) -> dict[str, Any]:
    """The last value of every metric, and what the run was made with."""
    metrics: dict[str, Any] = {}
    for row in read_rows(folder.metrics):
        metrics.update(row)
    training_s = sum(row["elapsed_s"] for row in read_rows(folder.timing))
    return {
        "samples": module.samples,
        "steps": module.step,
        "training_s": training_s,
        "samples_per_s": module.samples / max(1e-9, training_s),
        "metrics": metrics,
        "environment": environment(),
    }


def _nothing(samples: int) -> None:
    pass


def _waited_s(trainer: L.Trainer) -> float:
    return float(getattr(trainer.train_dataloader, "waited_s", 0.0))


def measure_sizes(module: TrainingModule, data: ActivationData) -> dict[str, str]:
    """What a run will take, found by running one batch forward and backward."""
    num_parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    batch = next(iter(data.train_dataloader()))
    began_s = time.perf_counter()
    loss = module.training_step(batch, 0)
    torch.autograd.backward(loss)
    seconds = time.perf_counter() - began_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cache_bytes = sum(file.stat().st_size for file in data.cache.path.rglob("*") if file.is_file())
    steps_per_pass = data.cache.num_train_rows / module.batch
    return {
        "parameters": f"{num_parameters:,}",
        "parameters, gradients, Adam": f"{num_parameters * 16 / 2**20:,.0f} MiB",
        "peak memory of this process": f"{peak_mib:,.0f} MiB",
        "checkpoint on disk": f"{num_parameters * 12 / 2**20:,.0f} MiB each",
        "cache on disk": f"{cache_bytes / 2**20:,.0f} MiB",
        "samples per pass": f"{data.cache.num_train_rows:,} ({steps_per_pass:.1f} steps)",
        "budget": f"{module.total_steps * module.batch:,} samples, {module.total_steps:,} steps",
        "one micro-batch": f"{len(batch.x_BD):,} rows, loss {float(loss.detach()):.4g}, {seconds:.2f} s",
    }
