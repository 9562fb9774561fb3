"""All that can be wrong with a configuration before anything is built."""

from __future__ import annotations

import pkgutil
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sparsepilot.callbacks.disturb import disturbance
from sparsepilot.config.instantiate import instantiate
from sparsepilot.config.plain import plain_values
from sparsepilot.config.shards import check_shards
from sparsepilot.config.signature import check_fields, check_mapping, check_target, takes
from sparsepilot.config.trainees import each_alone, naming
from sparsepilot.errors import ConfigError
from sparsepilot.lm import load as lm_load
from sparsepilot.lm import text as lm_text
from sparsepilot.parallel.sharded import Sharded
from sparsepilot.ranks import num_devices, num_shards, ranks_here, uneven_nodes
from sparsepilot.reporting.wandb import resolve_mode
from sparsepilot.wiring import STARTING, WIRING, check_sites, wire

LIVE = ("lm", "text", "folder", "say")
"""What a data group is given that runs the language model itself (data=live)."""

GROUPS = ("model", "controller", "optimizer", "schedule", "data", "lm", "text", "trainer")
"""Those that cannot be left out."""

BEST_BY = ("val/fvu", "val/loss", "val/mse", "val/ce")
"""Validation metrics of which less is better."""


def check(cfg: DictConfig) -> None:
    """Checks every field and the relations between groups.

    Raises:
        ConfigError: one line that names the field, its value and what would be right.
    """
    _complete(cfg)
    for name, alone in each_alone(cfg).items():
        with naming(cfg, name):
            _check_one(_complete(alone))


def _check_one(plain: dict[str, Any]) -> None:
    """Of a run with one trainee."""
    for group in GROUPS:
        check_mapping(group, plain[group])
    _check_numbers(plain)
    wiring = {k: v for k, v in plain["model"].items() if k in WIRING}
    check_fields("model", wiring, wire, given=("data",))
    check_sites(**wiring)
    check_fields("model", {k: v for k, v in plain["model"].items() if k in STARTING}, _starting_fields)
    built = {k: v for k, v in plain["model"].items() if k not in WIRING + STARTING}
    check_target("model", built, given=("blocks", "shard"))
    check_target("controller", plain["controller"])
    check_target("optimizer", plain["optimizer"], given=("params",))
    if plain["optimizer"].get("lr") is not None and plain["optimizer"]["lr"] <= 0:
        raise ConfigError(f"optimizer.lr = {plain['optimizer']['lr']}: a positive learning rate is needed")
    _try_optimizer(plain["optimizer"])
    check_target("schedule", plain["schedule"], given=("samples", "total_samples"))
    _check_data(plain)
    _check_trainer(plain["trainer"])
    _check_loggers(plain["logger"] or {})
    _check_controller(plain)
    disturb = plain["callbacks"]["disturb"]
    if disturb is not None:
        check_mapping("callbacks.disturb", disturb, "null disturbs nothing")
        check_fields("callbacks.disturb", disturb, disturbance)
    if plain["cross_entropy"] is not None:
        _check_cross_entropy(plain)
    check_shards(plain)
    _check_relations(plain)


def check_cache(cfg: DictConfig) -> dict[str, Any]:
    """The same for `scripts/cache_activations.py`; returns the plain values.

    Raises:
        ConfigError: one line that names the field, its value and what would be right.
    """
    plain = _complete(cfg)
    check_mapping("data", plain["data"])
    _check_data(plain)
    if plain["data"].get("build") is None:
        raise ConfigError(
            "data.build = None: this data group does not say how to build its cache; use data=demo or data=lm"
        )
    return plain


def _complete(cfg: DictConfig) -> dict[str, Any]:
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        first = sorted(missing)[0]
        raise ConfigError(f"{first}: missing; set {first}=...")
    return plain_values(cfg)


def _check_data(plain: dict[str, Any]) -> None:
    data = dict(plain["data"])
    build = data.pop("build", None)
    check_target("data", data, given=("batch", "accumulate", "total_samples", "seed", *LIVE))
    if takes(data, "lm"):
        _check_lm_and_text(plain)
    if build is not None:
        check_mapping("data.build", build, "null builds nothing")
        if isinstance(data["path"], dict):
            raise ConfigError(
                f"data.path = {data['path']}: data.build makes one cache; make each by itself with "
                "scripts/cache_activations.py, then read them together with data=cache"
            )
        from_lm = str(build.get("_target_")).endswith("build_from_lm")
        given = (
            ("path", "sites", "lm", "text", "seed", "rank", "world", "console")
            if from_lm
            else ("path", "progress", "rank", "world")
        )
        check_target("data.build", build, given=given)
        if from_lm:
            _check_lm_and_text(plain)


def _check_lm_and_text(plain: dict[str, Any]) -> None:
    check_fields("lm", plain["lm"], lm_load.load)
    check_fields("text", plain["text"], lm_text.documents)


def _try_optimizer(node: dict[str, Any]) -> None:
    """Builds the optimizer once on a stand-in: what ranges its library has, it says itself."""
    stand_in = [{"params": [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))]}]
    try:
        instantiate(node, _convert_="all")(stand_in)
    except (ValueError, TypeError) as error:
        fields = ", ".join(f"{k}={v}" for k, v in node.items() if not k.startswith("_"))
        raise ConfigError(f"optimizer ({fields}): {error}") from error


def _check_numbers(plain: dict[str, Any]) -> None:
    for name in ("samples", "batch", "accumulate"):
        if plain[name] < 1:
            raise ConfigError(f"{name} = {plain[name]}: at least 1 is needed")
    if plain["threads"] is not None and plain["threads"] < 1:
        raise ConfigError(f"threads = {plain['threads']}: at least 1 is needed, or null for torch's own choice")
    if plain["clip_norm"] is not None and plain["clip_norm"] <= 0:
        raise ConfigError(f"clip_norm = {plain['clip_norm']}: a positive norm is needed, or null for no clipping")
    if plain["seed"] < 0:
        raise ConfigError(f"seed = {plain['seed']}: 0 or more is needed")
    callbacks = plain["callbacks"]
    if callbacks["keep_last"] < 2:
        raise ConfigError(f"callbacks.keep_last = {callbacks['keep_last']}: at least 2, so that one may be damaged")
    if callbacks["keep_best"] < 0:
        raise ConfigError(f"callbacks.keep_best = {callbacks['keep_best']}: 0 or more is needed")
    if callbacks["best_by"] == "val/ce" and plain["cross_entropy"] is None:
        raise ConfigError("callbacks.best_by = val/ce: is not measured; set cross_entropy=spliced")
    if callbacks["best_by"] not in BEST_BY:
        raise ConfigError(f"callbacks.best_by = {callbacks['best_by']}: should be one of {', '.join(BEST_BY)}")
    for name in ("log_every_steps", "validate_every_samples", "checkpoint_every_samples"):
        if callbacks[name] is not None and callbacks[name] < 1:
            raise ConfigError(f"callbacks.{name} = {callbacks[name]}: at least 1 is needed")
    if callbacks["checkpoint_every_minutes"] <= 0:
        raise ConfigError(
            f"callbacks.checkpoint_every_minutes = {callbacks['checkpoint_every_minutes']}: a positive time is needed"
        )


def _check_cross_entropy(plain: dict[str, Any]) -> None:
    """What can be said before there is a cache; `sparsepilot.cross_entropy` says the rest before training starts."""
    node, data, sites = plain["cross_entropy"], plain["data"], plain["model"].get("sites")
    check_mapping("cross_entropy", node, "use cross_entropy=spliced, or cross_entropy=none")
    if "_target_" not in node:
        raise ConfigError("cross_entropy: has no _target_; use cross_entropy=spliced, or cross_entropy=none")
    check_target("cross_entropy", node, given=("data", "sites", "lm", "shared"))
    check_fields("lm", plain["lm"], lm_load.load)
    build = data.get("build")
    if build is not None and not build["_target_"].endswith("build_from_lm"):
        raise ConfigError(
            f"cross_entropy: data.build ({build['_target_']}) makes rows without a language model; use a cache of one "
            "(data=demo, data=lm), or cross_entropy=none"
        )
    if takes(data, "lm") and data.get("val_fraction") == 0:
        raise ConfigError("cross_entropy: data.val_fraction = 0 holds out no text to measure it on; set it above 0")
    if isinstance(data.get("path"), dict):
        raise ConfigError(
            f"cross_entropy: data.path = {data['path']} names several caches, each made by its own language model; "
            "set cross_entropy=none"
        )
    read = sites["read"] if isinstance(sites, dict) else sites if sites is not None else data["sites"]
    write = sites["write"] if isinstance(sites, dict) else read
    for names in (read, write):
        if len(names) > 1:
            raise ConfigError(
                f"cross_entropy: the dictionary has several sites ({', '.join(names)}), and no one place to be spliced "
                "in; it is measured where one is read and one is written; set cross_entropy=none"
            )
    often, tokens, every = (node.get(name) for name in ("often_tokens", "tokens", "every_samples"))
    if often is not None and every is None:
        raise ConfigError(
            f"cross_entropy.often_tokens = {often}: nothing is measured between validations; set "
            "cross_entropy.every_samples, too"
        )
    if often is not None and tokens is not None and often > tokens:
        raise ConfigError(f"cross_entropy.often_tokens = {often}: at most cross_entropy.tokens = {tokens}")


PRECISIONS = ("32-true", "bf16-mixed")

OURS = {
    "max_epochs": "samples",
    "max_steps": "samples",
    "min_epochs": "samples",
    "min_steps": "samples",
    "max_time": "samples",
    "limit_train_batches": "samples",
    "overfit_batches": "samples",
    "fast_dev_run": "debug=default",
    "accumulate_grad_batches": "accumulate",
    "gradient_clip_val": "clip_norm",
    "gradient_clip_algorithm": "clip_norm",
    "val_check_interval": "callbacks.validate_every_samples",
    "check_val_every_n_epoch": "callbacks.validate_every_samples",
    "limit_val_batches": "data.val_rows",
    "num_sanity_val_steps": "callbacks.validate_every_samples",
    "log_every_n_steps": "callbacks.log_every_steps",
    "enable_checkpointing": "callbacks.checkpoint_every_minutes",
    "default_root_dir": "run_dir",
    "logger": "logger=...",
    "callbacks": "callbacks.*",
    "plugins": "trainer=...",
    "deterministic": "trainer=...",
    "use_distributed_sampler": "data.num_streams",
    "enable_progress_bar": "trainer=...",
    "enable_model_summary": "check=true",
    "reload_dataloaders_every_n_epochs": "samples",
}
"""Arguments of Lightning's Trainer that this project sets itself, and what to use instead."""


def _check_trainer(trainer: dict[str, Any]) -> None:
    for name, instead in OURS.items():
        if name in trainer:
            raise ConfigError(f"trainer.{name} = {trainer[name]!r}: this project sets that itself; use {instead}")
    check_target("trainer", {key: value for key, value in trainer.items() if key != "reproducible"})
    if not isinstance(trainer.get("reproducible", False), bool):
        raise ConfigError(f"trainer.reproducible = {trainer['reproducible']!r}: should be true or false")
    if trainer.get("reproducible") and _is_sharded(trainer):
        raise ConfigError(
            "trainer.reproducible = True: needs whole gradients, which are divided among ranks here; use trainer=ddp"
        )
    if str(trainer.get("precision", "32-true")) not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision = {trainer['precision']!r}: should be one of {', '.join(PRECISIONS)}; parameters, "
            "their gradients and losses are fp32 in all of them"
        )
    _check_ranks(trainer)


def _is_sharded(trainer: dict[str, Any]) -> bool:
    """Whether its parameters are spread over ranks."""
    strategy = trainer.get("strategy")
    return isinstance(strategy, dict) and issubclass(pkgutil.resolve_name(strategy["_target_"]), Sharded)


def _check_ranks(trainer: dict[str, Any]) -> None:
    """One process per device, and a strategy of this project where there are several."""
    devices = trainer.get("devices", 1)
    try:
        local = num_devices(trainer)
    except (TypeError, ValueError):
        local = 0
    nodes = trainer.get("num_nodes", 1)
    for name, value, number in (("devices", devices, local), ("num_nodes", nodes, nodes)):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"trainer.{name} = {value!r}: how many is needed, 1 or more")
    world, strategy = local * nodes, trainer.get("strategy", "auto")
    if world > 1 and not isinstance(strategy, dict):
        cpu = trainer.get("accelerator") == "cpu"
        raise ConfigError(
            f"trainer.devices = {devices!r}: {world} ranks need trainer={'ddp_gloo' if cpu else 'ddp'}; "
            f"trainer.strategy = {strategy!r} says nothing of how they work together"
        )
    if (tasks := uneven_nodes()) is not None:
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {tasks}: every node needs as many; set --ntasks-per-node")
    here = ranks_here()
    if here is not None and (here.world, here.local_world) != (world, local):
        raise ConfigError(
            f"trainer.devices = {devices!r}, trainer.num_nodes = {nodes}: {here.world} processes were started, "
            f"{here.local_world} of them on this machine; set trainer.devices={here.local_world} "
            f"trainer.num_nodes={here.world // here.local_world}, or use trainer=multinode"
        )
    if here is None and world > 1 and nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes = {nodes}: nobody has started the processes on the other machines; use srun "
            "(slurm/train.sbatch) or torchrun"
        )


def _check_controller(plain: dict[str, Any]) -> None:
    """What a controller needs of other groups; its `bind` says the rest once the model is there."""
    node, d_sae = plain["controller"], plain["model"].get("d_sae")
    instantiate(node, _convert_="all")  # says what its fields have to do with each other
    wants_ce = node.get("quality", "fvu") != "fvu"  # every other quality is the language model's
    if wants_ce and plain["cross_entropy"] is None:
        raise ConfigError(
            f"controller.quality = {node['quality']}: is not measured; set cross_entropy=spliced, or "
            "controller.quality=fvu"
        )
    targets = [node.get("target_l0"), *(node.get("targets") or [])]
    for target in targets:
        if target is not None and d_sae is not None and target > d_sae:
            field = "controller.targets" if node.get("targets") else "controller.target_l0"
            raise ConfigError(f"{field}: an L0 of {target:g} is wanted; there are model.d_sae = {d_sae} latents")


def _check_loggers(loggers: dict[str, Any]) -> None:
    check_mapping("logger", loggers, "use logger=none, csv, tensorboard or wandb")
    for name, node in loggers.items():
        check_mapping(f"logger.{name}", node, "use logger=none to have metrics.jsonl alone")
        if "_target_" in node:
            check_target(f"logger.{name}", node)
        elif name == "wandb":
            check_fields("logger.wandb", node, _wandb_fields)
            resolve_mode(node["mode"])
        else:
            raise ConfigError(f"logger.{name}: has no _target_; give it one, or use logger=wandb")


def _wandb_fields(
    mode: str, project: str, entity: str | None = None, group: str | None = None, tags: list[str] | None = None
) -> None:
    """The signature of conf/logger/wandb.yaml."""


def _starting_fields(init_from: str | None = None) -> None:
    """The signature of what `starting.py` reads of the model group."""


def _check_relations(plain: dict[str, Any]) -> None:
    model, batch, accumulate = plain["model"], plain["batch"], plain["accumulate"]
    streams = plain["data"].get("num_streams", 64)
    if model.get("k") is not None and model.get("d_sae") is not None and model["k"] > model["d_sae"]:
        raise ConfigError(f"model.k = {model['k']}: at most model.d_sae = {model['d_sae']} latents can be active")
    anneal_from = model.get("anneal_k_from")
    if anneal_from is not None and not model["k"] <= anneal_from <= model["d_sae"]:
        raise ConfigError(
            f"model.anneal_k_from = {anneal_from}: should lie between model.k = {model['k']} and model.d_sae = "
            f"{model['d_sae']}; k falls from it"
        )
    aux_k = (model.get("revival") or {}).get("aux_k")
    if aux_k is not None and aux_k > model["d_sae"]:
        raise ConfigError(f"model.revival.aux_k = {aux_k}: at most model.d_sae = {model['d_sae']}")
    if batch % (streams * accumulate):
        unit = streams * accumulate
        below, above = batch // unit * unit, -(-batch // unit) * unit
        right = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch = {batch}: must be a multiple of data.num_streams x accumulate = {streams} x {accumulate}, "
            f"e.g. {right}"
        )
    world = num_devices(plain["trainer"]) * plain["trainer"].get("num_nodes", 1)
    readers = world // num_shards(plain["trainer"])  # the others read the same rows
    if streams % readers:
        nodes, shards = plain["trainer"].get("num_nodes", 1), world // readers
        numbers = (divisor * shards / nodes for divisor in range(1, streams + 1) if streams % divisor == 0)
        allowed = ", ".join(f"{number:.0f}" for number in numbers if number >= 1 and number % 1 == 0)
        who = f"{readers} ranks" if shards == 1 else f"{readers} groups of {shards} ranks"
        where = f" on each of {nodes} nodes" if nodes > 1 else ""
        raise ConfigError(
            f"trainer.devices = {plain['trainer'].get('devices', 1)!r}: {who} cannot share data.num_streams = "
            f"{streams} equally; so many{where} can: {allowed}"
        )
    if plain["trainer"].get("reproducible"):
        if streams & (streams - 1):
            raise ConfigError(f"data.num_streams = {streams}: trainer.reproducible needs a power of two")
        if accumulate > 1:
            raise ConfigError(
                f"accumulate = {accumulate}: trainer.reproducible takes a step stream by stream already, {streams} of "
                "them; set accumulate=1"
            )
    if plain["samples"] < batch:
        raise ConfigError(f"samples = {plain['samples']}: the budget is less than one batch of {batch}")
