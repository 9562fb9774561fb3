"""The one place where the halves of a run meet: configuration, cache, model, Lightning, run folder."""

from __future__ import annotations

import functools
import logging
import os
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from sparsepilot import faults, launch
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.caching import build_cache, check_recipe, is_sealed
from sparsepilot.callbacks.checkpoint import CrashSafeCheckpoint
from sparsepilot.callbacks.checkpoint_io import CrashSafeIO
from sparsepilot.callbacks.disturb import Disturb
from sparsepilot.callbacks.progress import ProgressLine
from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.callbacks.stop import StopAtStep, leave_signals_alone
from sparsepilot.callbacks.validate import ValidateEvery
from sparsepilot.claim import Claim, claim_together, record_start, record_trainees
from sparsepilot.config.check import LIVE, check
from sparsepilot.config.instantiate import instantiate
from sparsepilot.config.resume import differences
from sparsepilot.config.signature import takes
from sparsepilot.config.trainees import each_alone, naming
from sparsepilot.controllers.base import Controller
from sparsepilot.controllers.closed_loop import refuse_without_held_out
from sparsepilot.data.datamodule import RunData
from sparsepilot.data.files import one_at_a_time
from sparsepilot.errors import ConfigError
from sparsepilot.interop import dictionary
from sparsepilot.interop.fold import fold
from sparsepilot.parallel import agreement, mesh
from sparsepilot.parallel.ddp import DataParallel
from sparsepilot.parallel.latents import Shard
from sparsepilot.parallel.shards import gather_to_first
from sparsepilot.process_memory import keep_freed_memory
from sparsepilot.ranks import num_shards, own_cpus, ranks_here
from sparsepilot.reporting.environment import environment
from sparsepilot.reporting.report import report_or_say
from sparsepilot.reporting.summary import print_end, print_sizes
from sparsepilot.reporting.wandb import WandbCopy
from sparsepilot.rows import read_rows, rows_of_trainee
from sparsepilot.run_folder import RunFolder, write_json
from sparsepilot.starting import Origin, begin_from, load_origin
from sparsepilot.training.module import Schedule, TrainingModule
from sparsepilot.training.trainee import Sites, Trainee
from sparsepilot.training.validation import CrossEntropy, Validation
from sparsepilot.wiring import STARTING, WIRING, wire

NO_LIGHTNING_VALIDATION = 2**62  # batches; ValidateEvery decides instead


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
    claimed = claim_together(cfg.run_dir, cfg.resume.value, plain(cfg))
    folder = claimed.folder
    cfg.run_dir = str(folder.path)  # resume=never may have found a fresh one
    for note in claimed.notes:
        console.print(note, highlight=False)
    faults.point("resume-claimed")
    try:
        # before a cache is built; a run that goes on has weights of its own
        origins = load_origins(cfg) if claimed.checkpoint is None else {}
        data = build_data(cfg, console)
        data.start_sample = claimed.samples
        module = build_module(cfg, data)
        _begin_from(origins, module, cfg, console)
        _say_stretched(cfg, module, claimed, console)
        _say_notes(cfg, module, console)
        wanted = plain(cfg)["logger"].get("wandb") if claimed.writes else None
        wandb = WandbCopy(folder, wanted, lambda text: console.print(text, highlight=False))
        several = list(cfg.trainees or ())
        log = RunLog(folder, claimed.samples, lambda: _waited_s(trainer), wandb.after_checkpoint, several)
        trainer = build_trainer(cfg, folder, log, console, claimed.samples)
        agreement.meet()

        def begin() -> None:
            claimed.lock()  # only now: a fresh folder is made when nothing can be wrong with the input any more
            unfinished = claimed.samples < _total(cfg)
            record_start(folder, plain(cfg), data.cache.fingerprint, claimed.samples, trains=unfinished)
            if cfg.trainees:
                record_trainees(folder, {name: plain(alone) for name, alone in each_alone(cfg).items()})
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
    _begin_from(origins, module, cfg, console)
    folder = RunFolder(cfg.run_dir)
    _say_notes(cfg, module, console)
    build_trainer(cfg, folder, RunLog(folder, samples=0), console, samples=0)
    sizes = measure_sizes(module, data)
    print_sizes(console, sizes)
    return sizes


# ---------------------------------------------------------------------------------------------------- before a run


def uses_cuda(cfg: DictConfig) -> bool:
    """Whether a run's tensors are on NVIDIA devices."""
    return cfg.trainer.get("accelerator") in ("gpu", "cuda") or (
        cfg.trainer.get("accelerator", "auto") == "auto" and torch.cuda.is_available()
    )


def check_alike(cfg: DictConfig) -> None:
    """Refuses ranks that were started with different configurations (a file edited between two starts, say).

    The run folder may differ: its name may hold the time of day, and rank 0's is taken.

    Raises:
        ConfigError: naming the first rank and field that differ.
    """
    mine = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False, enum_to_str=True))
    configs = agreement.from_all({**mine, "run_dir": None})
    for number, other in enumerate(configs):
        for change in differences(configs[0], other):
            raise ConfigError(f"rank {number} was started with another configuration than rank 0: {change}")


def prepare_process(cfg: DictConfig) -> None:
    """Seeds, threads, deterministic kernels, and libraries that keep quiet."""
    here = ranks_here()
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    elif here is not None and "OMP_NUM_THREADS" not in os.environ:
        cpus, seen = own_cpus(), torch.get_num_threads()
        torch.set_num_threads(max(1, seen // here.local_world if cpus is None else min(seen, cpus)))
    if here is not None:  # or Lightning would choose their number itself
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    keep_freed_memory()
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before Lightning does: a language model runs earlier
    # filling every fresh tensor would cost more than the sparse step; no kernel here reads memory that it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # bfloat16 products add up in fp32: the bounds of ops/product.py rely on it
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    L.seed_everything(cfg.seed, verbose=False)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 asks torch 2.13 about its tree type in the old way; nothing that a user could act on
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # where Slurm is installed: ranks.py knows whether srun was used
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    # a run that had ended and is started again has no batch left, a cache may have no validation rows
    warnings.filterwarnings("ignore", message="Total length of .* across ranks is zero")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))


def _say_stretched(cfg: DictConfig, module: TrainingModule, claimed: Claim, console: Console) -> None:
    """Says where a longer budget, which stretches what is given in shares of it, moves the learning rate and what a
    controller has planned."""
    for change in claimed.changes:
        if change.field != "samples":
            continue
        budgets = [_whole_batches(samples, cfg.batch) for samples in (change.was, change.now)]
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


# ---------------------------------------------------------------------------------------------------- building


def build_data(cfg: DictConfig, console: Console) -> RunData:
    """The datamodule; a cache that is not there yet is built first, where the configuration says how."""
    values = plain(cfg)
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
    given = {"batch": cfg.batch, "accumulate": cfg.accumulate, "total_samples": _total(cfg), "seed": cfg.seed}
    live = {"lm": values["lm"], "text": values["text"], "folder": cfg.run_dir, "say": console.print}
    given |= {name: live[name] for name in takes(node, *LIVE)}
    return cast(RunData, instantiate(node, **given, _convert_="all", _recursive_=False))


def _total(cfg: DictConfig) -> int:
    """The budget in whole batches, rounded up."""
    return _whole_batches(int(cfg.samples), int(cfg.batch))


def _whole_batches(samples: int, batch: int) -> int:
    return -(-samples // batch) * batch


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
        total_samples=_total(cfg),
        clip_norm=cfg.clip_norm,
        log_every_steps=cfg.callbacks.log_every_steps,
        reproducible=cfg.trainer.get("reproducible", False),
    )


def build_trainee(cfg: DictConfig, data: RunData, schedule: Schedule) -> Trainee:
    """A dictionary and its controller."""
    total_samples = _total(cfg)
    model = plain(cfg)["model"]
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
    values = plain(cfg)
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


def _begin_from(origins: dict[str, Origin], module: TrainingModule, cfg: DictConfig, console: Console) -> None:
    """Gives fresh trainees the weights that `model.init_from` names, and says what is different about them."""
    for name, origin in origins.items():
        with naming(cfg, name):
            notes = begin_from(origin, cast(Trainee, module.trainees[name]))
        for note in notes:
            console.print(f"{f'trainees.{name}.' if cfg.trainees else ''}model.init_from: {note}", highlight=False)


def build_trainer(cfg: DictConfig, folder: RunFolder, log: RunLog, console: Console, samples: int) -> L.Trainer:
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
        *([Disturb(**{**when.disturb, "at": int(when.disturb["at"] * total_samples)})] if when.disturb else []),
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
                {key: value for key, value in plain(cfg)["trainer"].items() if key != "reproducible"},
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


# ---------------------------------------------------------------------------------------------------- after a run


def finish(folder: RunFolder, module: TrainingModule, data: RunData, writes: bool) -> dict[str, Any]:
    """Writes the trained dictionary and summary.json on the rank that `writes`; all ranks call it, with their parts. Of
    several trainees, each one's go into its own folder, too."""
    names = list(module.trainees)
    for name, (prefix, trainee) in zip(names, module.each(), strict=True):
        gathered = {key: gather_to_first(tensor) for key, tensor in trainee.autoencoder.whole_tensors().items()}
        if not writes:
            continue
        tensors = {key: tensor for key, tensor in gathered.items() if tensor is not None}
        save_dictionary(folder.of_trainee(name) if prefix else folder, trainee, tensors, module.samples, data)
        faults.point("finish-dictionary")
        if prefix:
            rows = rows_of_trainee(read_rows(folder.metrics), name, names)
            write_json(folder.of_trainee(name).summary, summarise(folder, module, rows))
    if not writes:
        return {}
    summary = summarise(folder, module, read_rows(folder.metrics))
    write_json(folder.summary, summary)
    return summary


def save_dictionary(
    folder: RunFolder, trainee: Trainee, tensors: dict[str, Tensor], samples: int, data: RunData
) -> None:
    """Writes a trained dictionary, whose whole `tensors` these are, for raw activations."""
    cfg_out = {
        **trainee.autoencoder.inference_config(trainee.controller.strength),
        "sites": [site.name for site in trainee.sites.reads],
        "sites_out": [site.name for site in trainee.sites.writes or trainee.sites.reads],
        "samples": samples,
        "cache_fingerprint": data.cache.fingerprint,
        "source": data.cache.source,
        "input_scale_in_training": [site.scale for site in trainee.sites.reads],
    }
    folded = fold(cfg_out, tensors, trainee.scale_in.cpu(), trainee.scale_out.cpu())
    dictionary.save(folder.path, cfg_out, folded)


def summarise(folder: RunFolder, module: TrainingModule, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every metric, and what the run was made with."""
    metrics: dict[str, Any] = {}
    for row in rows:
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
