"""The ranks that a job would run on, whether or not they are there."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf

from sparsepilot.errors import ConfigError
from sparsepilot.estimate.wanted import Wanted
from sparsepilot.ranks import num_devices

Kind = Literal["one", "ddp", "fsdp", "feature_parallel"]
STRATEGIES: dict[str, Kind] = {"DataParallel": "ddp", "FullySharded": "fsdp", "FeatureParallel": "feature_parallel"}


class World(NamedTuple):
    """Who does what."""

    kind: Kind
    ranks: int
    nodes: int
    features: int
    """ranks that share the latents of one dictionary; 1 but for feature_parallel"""
    bf16_gradients: bool
    reproducible: bool

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of them, that read rows of their own."""
        return self.ranks // self.features


def read_world(cfg: DictConfig, wanted: Wanted) -> World:
    """The ranks that the options, or else the trainer, want.

    Raises:
        ConfigError: where their number is not known, or the trainer is not.
    """
    trainer = cast(dict[str, Any], OmegaConf.to_container(cfg.trainer, resolve=True))
    nodes = wanted.nodes or int(trainer.get("num_nodes", 1))
    ranks = wanted.devices
    if ranks is None:
        if str(trainer.get("devices", 1)) in ("auto", "-1") and trainer.get("accelerator") != "cpu":
            found = torch.cuda.device_count()
            if found == 0:
                raise ConfigError(
                    f"trainer.devices = {trainer['devices']}: there is no GPU here to count; say how many, devices=8 "
                    "(and nodes=2)"
                )
            ranks = found * nodes
        else:
            ranks = num_devices(trainer) * nodes
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise ConfigError(f"devices = {ranks}, nodes = {nodes}: devices are counted in all, equally many on each node")
    strategy = trainer.get("strategy")
    kind: Kind = "one"
    if isinstance(strategy, dict):
        name = str(strategy.get("_target_", "")).rpartition(".")[2]
        if name not in STRATEGIES:
            raise ConfigError(f"trainer.strategy._target_ = {name}: only {', '.join(STRATEGIES)} can be estimated")
        kind = STRATEGIES[name]
    elif ranks > 1:
        raise ConfigError(f"devices = {ranks}: several ranks need trainer=ddp, fsdp or feature_parallel")
    settings = strategy if isinstance(strategy, dict) else {}
    features = (settings.get("features") or ranks) if kind == "feature_parallel" else 1
    if ranks % features:
        raise ConfigError(f"trainer.strategy.features = {features}: does not divide {ranks} ranks")
    bf16 = settings.get("gradients") == "bfloat16"
    return World(kind, ranks, nodes, features, bf16, bool(trainer.get("reproducible", False)))
