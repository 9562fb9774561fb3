"""The one place where the halves of a run meet: configuration, cache, model, Lightning, run folder."""

from __future__ import annotations

import os
import resource
import shlex
import sys
import time
from typing import Any, cast

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from sparsepilot import faults, launch
from sparsepilot.building import (
    begin_from_origins,
    build_data,
    build_module,
    build_trainer,
    load_origins,
    total_of,
    whole_batches,
)
from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.claim import Claim, claim_together, record_start, record_trainees
from sparsepilot.config.check import check
from sparsepilot.config.instantiate import instantiate
from sparsepilot.config.plain import plain_values
from sparsepilot.config.sweeping import note_folder
from sparsepilot.config.trainees import each_alone, put_in_order
from sparsepilot.data.datamodule import RunData
from sparsepilot.finishing import finish
from sparsepilot.parallel import agreement, mesh
from sparsepilot.process import check_alike, prepare_process, uses_cuda
from sparsepilot.ranks import num_shards
from sparsepilot.reporting.report import report_or_say
from sparsepilot.reporting.summary import print_end, print_sizes
from sparsepilot.reporting.wandb import WandbCopy
from sparsepilot.run_folder import RunFolder
from sparsepilot.training.module import TrainingModule
from sparsepilot.training.trainee import Trainee


def train(cfg: DictConfig, console: Console | None = None) -> dict[str, Any]:
    """Trains what `cfg` describes, or goes on with it, and returns the summary that it also writes.

    On several ranks each of them calls this; rank 0 alone writes, and on the others the summary is empty.

    Raises:
        SparsepilotError: on any bad input, before something is built where that is possible.
    """
    check(cfg)
    prepare_process(cfg)
    with agreement.losses_named():
        return _train(cfg, console)


def _train(cfg: DictConfig, console: Console | None) -> dict[str, Any]:
    agreement.join(cuda=uses_cuda(cfg))
    mesh.arrange(num_shards(cfg.trainer), cuda=uses_cuda(cfg))
    console = console or Console(soft_wrap=True, quiet=mesh.world().rank > 0)  # a path is never broken in two
    if cfg.check:
        return dict(check_run(cfg, console))
    check_alike(cfg)
    claimed = claim_together(cfg.run_dir, cfg.resume.value, plain_values(cfg))
    folder = claimed.folder
    cfg.run_dir = str(folder.path)  # resume=never may have found a fresh one
    if claimed.writes:
        note_folder(cfg.run_dir)
    if claimed.trainees:
        put_in_order(cfg, claimed.trainees)
    for note in claimed.notes:
        console.print(note, highlight=False)
    faults.point("resume-claimed")
    try:
        # before a cache is built; a run that goes on has weights of its own
        origins = load_origins(cfg) if claimed.checkpoint is None else {}
        data = build_data(cfg, console)
        claimed.check_rows(data.cache.fingerprint, cfg.data.get("path"))
        data.start_sample = claimed.samples
        module = build_module(cfg, data)
        begin_from_origins(origins, module, cfg, console)
        _say_stretched(cfg, module, claimed, console)
        _say_notes(cfg, module, console)
        wanted = plain_values(cfg)["logger"].get("wandb") if claimed.writes else None
        wandb = WandbCopy(folder, wanted, lambda text: console.print(text, highlight=False))
        several = list(cfg.trainees or ())
        log = RunLog(folder, claimed.samples, lambda: _waited_s(trainer), wandb.after_checkpoint, several)
        trainer = build_trainer(cfg, folder, log, console, claimed.samples)
        agreement.meet()

        def begin() -> None:
            claimed.lock()  # only now: a fresh folder is made when nothing can be wrong with the input any more
            unfinished = claimed.samples < total_of(cfg)
            record_start(folder, plain_values(cfg), data.cache.fingerprint, claimed.samples, trains=unfinished)
            if cfg.trainees:
                record_trainees(folder, {name: plain_values(alone) for name, alone in each_alone(cfg).items()})
            data.record()
            wandb.begin()

        agreement.from_first(begin)
        try:
            try:
                trainer.fit(module, datamodule=data, ckpt_path=claimed.checkpoint, weights_only=True)
            finally:
                log.close()
            summary = finish(folder, module, data, claimed.writes)
            if cfg.report and claimed.writes:
                report_or_say(folder, lambda text: console.print(text, highlight=False))
                wandb.add_pictures()
        finally:
            wandb.close()
        wandb.finish()
    finally:
        claimed.release()
    agreement.leave()
    if summary:
        print_end(console, folder, summary, _widths(module), _command())
    return summary


def check_run(cfg: DictConfig, console: Console) -> dict[str, str]:
    """`check=true`: builds everything, runs one batch, prints what a run will take, leaves no run folder."""
    origins = load_origins(cfg)
    data = build_data(cfg, console)
    module = build_module(cfg, data)
    begin_from_origins(origins, module, cfg, console)
    folder = RunFolder(cfg.run_dir)
    _say_notes(cfg, module, console)
    build_trainer(cfg, folder, RunLog(folder, samples=0), console, samples=0)
    sizes = measure_sizes(module, data)
    print_sizes(console, sizes)
    return sizes


def _say_stretched(cfg: DictConfig, module: TrainingModule, claimed: Claim, console: Console) -> None:
    """Says where a longer budget, which stretches what is given in shares of it, moves the learning rate and what a
    controller has planned."""
    for change in claimed.changes:
        if change.field != "samples":
            continue
        budgets = [whole_batches(samples, cfg.batch) for samples in (change.was, change.now)]
        schedule = instantiate(cfg.schedule, _convert_="all")
        ways = {"the schedule": ("the learning rate", schedule)}
        for name, trainee in module.trainees.items():
            whose = f"trainees.{name}.controller" if cfg.trainees else "controller"
            ways[whose] = ("what it has planned", cast(Trainee, trainee).controller.planned)
        for whose, (what, at) in ways.items():
            was, now = (at(claimed.samples, budget) for budget in budgets)
            if was != now:
                console.print(
                    f"  {whose} now ends with the longer budget: {what} here goes from {was:.3g} to {now:.3g}",
                    highlight=False,
                )


def _say_notes(cfg: DictConfig, module: TrainingModule, console: Console) -> None:
    """What controllers have to say of their settings."""
    for name, trainee in module.trainees.items():
        for note in cast(Trainee, trainee).controller.notes():
            console.print(f"  {f'trainees.{name}.' if cfg.trainees else ''}{note}", highlight=False)


def measure_sizes(module: TrainingModule, data: RunData) -> dict[str, str]:
    """What a run will take, found by running one batch forward and backward."""
    each = {prefix: sum(p.numel() for p in trainee.parameters()) for prefix, trainee in module.each()}
    num_parameters = sum(each.values())
    shares = ", ".join(f"{prefix.rstrip('/')} {number:,}" for prefix, number in each.items() if prefix)
    batch = next(iter(data.train_dataloader()))
    began_s = time.perf_counter()
    loss = module.training_step(batch, 0)
    torch.autograd.backward(loss)
    seconds = time.perf_counter() - began_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps_per_pass = data.cache.num_train_rows / module.batch
    return {
        "parameters": f"{num_parameters:,}" + (f" ({shares})" if shares else ""),
        "parameters, gradients, Adam": f"{num_parameters * 16 / 2**20:,.0f} MiB",
        "peak memory of this process": f"{peak_mib:,.0f} MiB",
        "checkpoint on disk": f"{num_parameters * 12 / 2**20:,.0f} MiB each",
        "cache on disk": f"{data.cache.disk_bytes() / 2**20:,.0f} MiB",
        "samples per pass": f"{data.cache.num_train_rows:,} ({steps_per_pass:.1f} steps)",
        "budget": f"{module.total_steps * module.batch:,} samples, {module.total_steps:,} steps",
        "one micro-batch": f"{len(batch.x_BD):,} rows, loss {float(loss.detach()):.4g}, {seconds:.2f} s",
    }


def _widths(module: TrainingModule) -> dict[str, int]:
    """Latents of each trainee, by the prefix of its metrics."""
    return {prefix: trainee.autoencoder.d_sae for prefix, trainee in module.each()}


def _command() -> str:
    """What the user typed, to build on: the interpreter, the script and its overrides."""
    python = "python" if "VIRTUAL_ENV" in os.environ else os.path.relpath(sys.executable)
    if launch.handed is not None:
        overrides = launch.handed.overrides
    else:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    kept = [word for word in overrides if not word.startswith(("run_dir=", "samples=", "resume="))]
    return " ".join([python, "train.py", *map(shlex.quote, kept)])


def _waited_s(trainer: L.Trainer) -> float:
    return float(getattr(trainer.train_dataloader, "waited_s", 0.0))
