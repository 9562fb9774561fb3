"""What conf/*.yaml may write between `${` and `}` beyond OmegaConf's own."""

from __future__ import annotations

import time
from typing import Any

from omegaconf import OmegaConf

from sparsepilot import slurm
from sparsepilot.ranks import ranks_here
from sparsepilot.sweep_folder import SweepFolder, place_here


def register_resolvers() -> None:
    """`${name:model}`: the class of a group in lower case. `${run_id:}`: what tells this run from others.
    `${started:devices}`, `${started:nodes}`: the processes that srun or torchrun has started.
    `${run_folder:<path>}`: that path, or a member's own folder in its sweep. `${sweep_id:<name>}`: what tells this
    sweep from others. `${sweep_name:}`: the sweep that a member belongs to, or null."""
    OmegaConf.register_new_resolver("name", _name, replace=True)
    OmegaConf.register_new_resolver("started", _started, replace=True)
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("sweep_id", _sweep_id, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)


def _name(group: str, *, _root_: Any) -> str:
    return str(_root_[group]["_target_"]).rpartition(".")[2].lower()


def _started(what: str) -> int:
    here = ranks_here()
    if here is None:
        return 1
    return here.local_world if what == "devices" else here.world // here.local_world


def _run_id() -> str:
    """The Slurm job id, so that a requeued job finds its folder again and all tasks agree; else the time of day.

    `${now:}` would do neither."""
    return slurm.job() or _time_of_day()


def _time_of_day() -> str:
    now_s = time.time()
    return time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now_s)) + f".{int(now_s * 1000) % 1000:03d}"


def _run_folder(by_itself: str) -> str:
    """A member's folder has its number for a name: the same however often its job is queued again."""
    member = place_here()
    return by_itself if member is None else f"{member.sweep}/{member.number}"


def _sweep_id(name: str | None) -> str:
    """One for all members (Hydra hands the value that it was first given on to them), and for a job that trains them
    one after the other the same after each requeue."""
    unique = slurm.job() or _time_of_day()
    return unique if name is None else f"{name}-{unique}"


def _sweep_name() -> str | None:
    member = place_here()
    return None if member is None else SweepFolder(member.sweep).name
