"""Which of how many processes of a run this one is. No torch here: a process that only starts others has no use for it.

A *rank* is one training process; a run has `world` of them, numbered from 0. Whoever started them says so in the
environment: `python train.py` itself (launch.py), torchrun, or Slurm's srun.
"""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Ranks(NamedTuple):
    """This process among those of its run."""

    rank: int
    world: int
    local_rank: int
    """its number on this machine"""
    local_world: int
    """how many of them are on this machine"""
    node: int
    """the machine's number"""


def ranks_here() -> Ranks | None:
    """What the environment says; None where this process is on its own."""
    env = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys():
        world = int(env["WORLD_SIZE"])
        local_world = int(env.get("LOCAL_WORLD_SIZE", world))
        found = Ranks(int(env["RANK"]), world, int(env["LOCAL_RANK"]), local_world, int(env.get("GROUP_RANK", 0)))
    elif env.get("SLURM_STEP_ID", "").isdigit() and "SLURM_STEP_NUM_TASKS" in env:  # a batch script has no such number
        world, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", 1))
        found = Ranks(
            int(env["SLURM_PROCID"]), world, int(env["SLURM_LOCALID"]), world // nodes, int(env["SLURM_NODEID"])
        )
    else:
        return None
    return found if found.world > 1 else None


def uneven_nodes() -> str | None:
    """srun's tasks per node where one node has more than another, "2,1"; as many on each of three are "2(x3)"."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return tasks if "," in tasks and "RANK" not in os.environ else None


def own_cpus() -> int | None:
    """CPUs that Slurm has given to this rank alone; None where the ranks of a machine share what is there."""
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(own) if own.isdigit() and ranks_here() is not None and "RANK" not in os.environ else None


def adopt(ranks: Ranks) -> None:
    """Says to torch and Lightning, in the variables that they read, what srun says in its own."""
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = str(ranks.rank), str(ranks.world)
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = str(ranks.local_rank), str(ranks.local_world)
    env["GROUP_RANK"] = str(ranks.node)
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    if "MASTER_PORT" not in env:  # each step of each job its own, the same for all of its tasks
        job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
        env["MASTER_PORT"] = str(JOB_PORTS[(job * 7 + step) % len(JOB_PORTS)])


JOB_PORTS = range(12_000, 20_000)
"""Where the ranks of a Slurm job meet, apart from:"""
PORTS = range(20_000, 32_768)
"""Where ranks meet that one machine has started: below what Linux deals out by itself, so that no connection or server
which begins between the choice of a port and rank 0's first use of it has been given the same one."""


def free_port() -> int:
    """One of `PORTS` at which nobody listens on this machine."""
    while True:
        port = random.SystemRandom().choice(PORTS)  # processes that were forked share the state of `random`
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # taken
                continue
            return port


def _first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts.

    >>> _first_host("gpu[03-07,9],other"), _first_host("a,b"), _first_host("n[1]")
    ('gpu03', 'a', 'n1')
    """
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def num_devices(trainer: Mapping[str, Any]) -> int:
    """Devices, so ranks, that a trainer's configuration wants on one machine.

    >>> num_devices({"devices": 4}), num_devices({"devices": [2, 3]}), num_devices({"devices": "0,1,5"})
    (4, 2, 3)
    """
    devices = trainer.get("devices", 1)
    if str(devices) in ("auto", "-1"):
        if trainer.get("accelerator") == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, str | int):
        return int(devices)
    return len(devices)


def num_shards(trainer: Mapping[str, Any]) -> int:
    """Ranks among which a trainer's configuration deals out the latents.

    >>> num_shards({"devices": 4}), num_shards({"devices": 4, "strategy": {"features": 2}})
    (1, 2)
    >>> num_shards({"devices": 4, "num_nodes": 2, "strategy": {"features": None}})
    8
    """
    strategy = trainer.get("strategy")
    if not isinstance(strategy, Mapping) or "features" not in strategy:
        return 1
    features = strategy["features"]
    return num_devices(trainer) * int(trainer.get("num_nodes", 1)) if features is None else int(features)


def is_first() -> bool:
    """Whether this process is rank 0, or on its own."""
    ranks = ranks_here()
    return ranks is None or ranks.rank == 0


SILENT_S = 10.0
"""What rank 0 may be behind the others in finding a mistake: another node, a slower disk."""


def speaks_after_first(line: str) -> bool:
    """Before the ranks have met all of them find the same mistake, and rank 0 says it.

    srun, torchrun and launch.py end the others once it has ended, and if another one ended sooner, they would end it
    before it spoke. Whoever is still there after a while has found what rank 0 has not, and says it.
    """
    if not is_first():
        time.sleep(SILENT_S)
    return True


may_say: list[Callable[[str], bool]] = [lambda line: True]
"""The last one decides whether this process prints a line of error: `speaks_after_first` where all do the same, and
once the ranks have met that of parallel/agreement.py."""
