"""What a process is set to before it trains, and whether the ranks of a run were told the same."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, cast

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from sparsepilot.config.resume import differences
from sparsepilot.errors import ConfigError
from sparsepilot.parallel import agreement
from sparsepilot.process_memory import keep_freed_memory
from sparsepilot.ranks import own_cpus, ranks_here


def uses_cuda(cfg: DictConfig) -> bool:
    """Whether a run's tensors are on NVIDIA devices."""
    return cfg.trainer.get("accelerator") in ("gpu", "cuda") or (
        cfg.trainer.get("accelerator", "auto") == "auto" and torch.cuda.is_available()
    )


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
