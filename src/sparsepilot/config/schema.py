"""The typed top level of a configuration. Groups (model, data, ...) are typed by the signature of what they build."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class Resume(Enum):
    """What to do where the run folder already holds a run."""

    auto = "auto"
    """go on where it stopped"""
    never = "never"
    """leave it alone and begin in a fresh folder beside it"""


@dataclass
class Callbacks:
    """When things happen, in optimizer steps, samples or minutes."""

    log_every_steps: int = MISSING
    validate_every_samples: int | None = MISSING
    """None: twenty times in the run"""
    checkpoint_every_minutes: float = MISSING
    checkpoint_every_samples: int | None = MISSING
    keep_last: int = MISSING
    keep_best: int = MISSING
    best_by: str = MISSING
    disturb: Any = None
    """None, or what disturbs the run once, see callbacks/disturb.py"""


@dataclass
class Config:
    """Everything that `train.py` reads."""

    model: Any = MISSING
    controller: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    data: Any = MISSING
    lm: Any = MISSING
    text: Any = MISSING
    cross_entropy: Any = MISSING
    """None, or what runs the language model with the reconstruction spliced in"""
    trainer: Any = MISSING
    logger: Any = MISSING
    trainees: Any = None
    """None: one dictionary; or name -> what is different about each of several, see config/trainees.py"""
    callbacks: Callbacks = field(default_factory=Callbacks)

    samples: int = MISSING
    """the budget: rows to train on, over all ranks"""
    batch: int = MISSING
    """rows per optimizer step, over all ranks and micro-batches"""
    accumulate: int = MISSING
    """micro-batches per optimizer step on each rank"""
    clip_norm: float | None = MISSING
    seed: int = MISSING
    threads: int | None = MISSING
    """CPU threads of torch; None leaves its own choice"""
    compile: bool = MISSING
    """torch.compile for the dense path of a step"""
    run_dir: str = MISSING
    resume: Resume = MISSING
    check: bool = MISSING
    """compose, build, run one batch, print sizes, stop"""
    report: bool = MISSING
    """draw the run into <run>/report when it ends"""


@dataclass
class CacheConfig:
    """Everything that `scripts/cache_activations.py` reads."""

    data: Any = MISSING
    lm: Any = MISSING
    text: Any = MISSING
    rank: int | None = MISSING
    world: int | None = MISSING
    # a data group may suit a run's sizes to itself (data=synthetic does); a cache has no use for them
    model: Any = None
    optimizer: Any = None
    samples: Any = None
    batch: Any = None


def register() -> None:
    """Makes the schemas known to Hydra; conf/train.yaml and conf/cache.yaml put them first."""
    ConfigStore.instance().store(name="schema", node=Config)
    ConfigStore.instance().store(name="cache_schema", node=CacheConfig)
