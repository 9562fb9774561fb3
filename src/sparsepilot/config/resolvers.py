"""What conf/*.yaml may write between `${` and `}` beyond OmegaConf's own."""

from __future__ import annotations

import os
import time
from typing import Any

from omegaconf import OmegaConf

from sparsepilot.ranks import ranks_here

RUN_ID = "SPARSEPILOT_RUN_ID"


def register_resolvers() -> None:
    """`${name:model}`: the class of a group in lower case. `${run_id:}`: what tells this run from others.
    `${started:devices}`, `${started:nodes}`: the processes that srun or torchrun has started."""
    OmegaConf.register_new_resolver("name", _name, replace=True)
    OmegaConf.register_new_resolver("started", _started, replace=True)
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True, use_cache=True)


def _name(group: str, *, _root_: Any) -> str:
    return str(_root_[group]["_target_"]).rpartition(".")[2].lower()


def _started(what: str) -> int:
    here = ranks_here()
    if here is None:
        return 1
    return here.local_world if what == "devices" else here.world // here.local_world


def _run_id() -> str:
    """The Slurm job id, so that a requeued job finds its folder again and all tasks agree; else the time of day.

    `${now:}` would do neither. Child processes of one run find the id in their environment."""
    env = os.environ
    if RUN_ID in env:
        return env[RUN_ID]
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    if "SLURM_JOB_ID" in env:
        return env["SLURM_JOB_ID"]
    now_s = time.time()
    return time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now_s)) + f".{int(now_s * 1000) % 1000:03d}"
