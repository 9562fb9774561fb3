"""The run under test as several ranks, each a process of its own, of which one or all get killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from killing.runs import REPOSITORY, Ended, environment_of
from sparsepilot.ranks import free_port

StartRanks = Callable[[int, list[str], Mapping[str, str]], list[Ended]]
"""(how many, arguments after `python`, environment to add) -> how each ended"""


def start_ranks(world: int, arguments: list[str], environment: Mapping[str, str]) -> list[Ended]:
    """Starts so many ranks of one run as torchrun would, and waits until all have ended."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        outs, processes = [os.path.join(folder, str(rank)) for rank in range(world)], []
        for rank, out in enumerate(outs):
            env = {**environment_of(environment), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(out, "w", encoding="utf-8") as file:
                command = [sys.executable, *arguments]
                processes.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=file, stderr=subprocess.STDOUT)
                )
        codes = [process.wait() for process in processes]
        texts = []
        for out in outs:
            with open(out, encoding="utf-8") as file:
                texts.append(file.read())
    return [Ended(code, text) for code, text in zip(codes, texts, strict=True)]


class Ranks:
    """A launcher for `RunUnderTest`: several processes in the place of one.

    It ended by a signal where one of them did, and badly where one of them did.
    """

    def __init__(self, world: int, trainer: str, start: StartRanks = start_ranks, more: Sequence[str] = ()) -> None:
        """more: overrides of the trainer."""
        self.world, self._start = world, start
        self._options = [f"trainer={trainer}", f"trainer.devices={world}", *more]

    def __call__(self, arguments: list[str], environment: Mapping[str, str]) -> Ended:
        ended = self._start(self.world, arguments + self._options, environment)
        codes = [e.code for e in ended]
        return Ended(min(codes) if min(codes) < 0 else max(codes), "".join(e.out for e in ended))
