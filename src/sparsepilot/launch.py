"""Starts the ranks of a run on this machine and watches them: where one ends badly, all end.

The starting process does not train. It hands its composed configuration to `trainer.devices` copies of the same script,
so that all have the very same one (a member of a Hydra sweep, too, whose command line is that of the whole sweep).
torchrun and srun do this as well, and where one of them did (`ranks.ranks_here`), nothing is started here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sparsepilot import slurm
from sparsepilot.errors import RankError
from sparsepilot.ranks import free_port, num_devices, ranks_here
from sparsepilot.sweep_folder import Place, place_here, told_place

LAUNCHED = "SPARSEPILOT_LAUNCHED"
"""In the environment of a rank that reads its configuration from stdin."""
GRACE_S = 15.0
"""From one rank's bad end to the end of the others: time to say what they have to say."""
SAID_S = 1.0
"""The same where rank 0 has ended with the status of an error that it has said."""


class Handed(NamedTuple):
    """What a rank is given by the process that started it."""

    config: dict[str, Any]
    overrides: list[str]
    """the user's command line, for what is printed at the end"""
    member: tuple[str, int] | None
    """of a sweep: its folder and this member's number"""


handed: Handed | None = None


def start_ranks(cfg: DictConfig, script: str) -> bool:
    """Trains with several ranks where `cfg` wants them and nobody has started them yet; False: train in this process.

    Args:
        cfg: composed.
        script: the file that each rank runs.

    Raises:
        SystemExit: with the status of the first rank that did not end well.
        RankError: the same, in a Hydra sweep, which goes on with its next member.
    """
    if cfg.check or ranks_here() is not None:
        return False
    try:
        count = num_devices(cfg.trainer)
    except (TypeError, ValueError):
        return False  # config.check says what is wrong with it
    if count <= 1:
        return False
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    member = place_here()
    ended = _watch(_start(script, count, json.dumps({"config": config, "overrides": overrides, "member": member})))
    if ended.said is not None:
        print(f"error: {ended.said}", file=sys.stderr)
    if ended.code != 0 or ended.stopped:
        if not ended.stopped and member is not None:
            raise RankError(f"{cfg.run_dir}: {ended.said or f'ended with status {ended.code}'}")
        raise SystemExit(ended.code)
    return True


def receive() -> Handed | None:
    """In a rank that `start_ranks` has started: what it was given. Call it once."""
    global handed
    if LAUNCHED not in os.environ:
        return None
    handed = Handed(**json.loads(sys.stdin.readline()))
    if handed.member is not None:
        told_place.append(Place(*handed.member))
    threading.Thread(target=_leave_with_parent, name="sparsepilot-parent", daemon=True).start()
    return handed


def is_watched() -> bool:
    """Whether a process of ours says how this rank's fellows ended."""
    return LAUNCHED in os.environ


def _leave_with_parent() -> None:
    """Stdin ends when the starting process is gone: finish the step, save, leave."""
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _start(script: str, count: int, told: str) -> list[subprocess.Popen[str]]:
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        LAUNCHED: "1",
    }
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), script]  # type: ignore[attr-defined]
    processes = []
    for rank in range(count):
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        # a session of its own: Ctrl-C reaches the ranks once, from here
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True, text=True)
        processes.append(process)
    for process in processes:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and is found so
            process.stdin.write(told + "\n")
            process.stdin.flush()
    return processes


class Ended(NamedTuple):
    """How the ranks ended."""

    code: int
    said: str | None
    """what no rank could say itself"""
    stopped: bool
    """a signal asked for it"""


def _watch(processes: Sequence[subprocess.Popen[str]]) -> Ended:
    """Waits for all ranks, hands signals on, and ends the rest where one ended badly."""
    asked: list[int] = []

    def forward(number: int, frame: Any) -> None:
        asked.append(number)
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in slurm.stop_signals()}
    bad: dict[int, int] = {}
    """exit status of the ranks that ended badly by themselves"""
    give_up_s = float("inf")
    try:
        while any(process.poll() is None for process in processes):
            _note_bad(processes, bad)
            if bad:
                give_up_s = min(give_up_s, time.monotonic() + (SAID_S if bad.get(0) == 2 else GRACE_S))
            if time.monotonic() > give_up_s:
                break
            time.sleep(0.05)
        else:
            _note_bad(processes, bad)
    finally:
        for process in processes:
            process.kill()  # those that are gone do not mind
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not bad:
        return Ended(0, None, bool(asked))
    # a rank that lost another one ends badly, too: the one that was killed is the cause
    rank, code = next(((r, code) for r, code in bad.items() if code < 0), next(iter(bad.items())))
    if code > 0:
        return Ended(code, None, bool(asked))
    if -code in asked and slurm.belongs_back(-code):  # it came before they were able to listen
        slurm.requeue()
        return Ended(0 if slurm.queued_again else 128 - code, None, True)  # as a process that trains alone
    name = signal.Signals(-code).name
    said = f"rank {rank} was ended by {name}; the same line again goes on from the last checkpoint"
    return Ended(128 - code, None if -code in asked else said, bool(asked))


def _note_bad(processes: Sequence[subprocess.Popen[str]], bad: dict[int, int]) -> None:
    for rank, process in enumerate(processes):
        if process.returncode and rank not in bad:
            bad[rank] = process.returncode
