"""Processes that start at once: forked from one that has imported torch, Lightning and the rest (warm_server.py)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from killing.runs import Ended

from sparsepilot.ranks import free_port

REPOSITORY = Path(__file__).resolve().parents[1]


class Warm:
    """Starts processes from the warm server; what `killing.runs.launch` does, five seconds sooner."""

    def __init__(self, folder: Path) -> None:
        """folder: where what the processes print is kept until it has been read."""
        self._outs = (folder / f"{number}.txt" for number in itertools.count())
        self._running: set[int] = set()
        self._unread: dict[int, list[Path]] = {}
        """process, of one that has ended too -> where what it printed is"""
        self._begin()

    def _begin(self) -> None:
        path = os.pathsep.join(str(REPOSITORY / name) for name in ("benchmarks", "src"))
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "500"},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"threads": 1}

    def __call__(self, arguments: list[str], environment: Mapping[str, str], file_bytes: int | None = None) -> Ended:
        """One process, until it ends."""
        pid = self._start(arguments, environment, next(self._outs), file_bytes=file_bytes)
        return Ended(self._wait(pid), *self._printed(pid))

    def script(
        self, arguments: Sequence[str], folder: Path = REPOSITORY, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """One process that works in `folder`, until it ends: stdout and stderr apart."""
        pid = self._start(list(arguments), environment, next(self._outs), next(self._outs), folder)
        return subprocess.CompletedProcess(list(arguments), self._wait(pid), *self._printed(pid))

    def ranks(
        self,
        world: int,
        arguments: list[str],
        environment: Mapping[str, str],
        *,
        file_bytes: Mapping[int, int] | None = None,
    ) -> list[Ended]:
        """So many ranks of one run, as torchrun would start them, until all have ended.

        Args:
            world: how many.
            arguments: of each.
            environment: of each.
            file_bytes: no file of this rank may grow past so many bytes.
        """
        meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = []
        for rank, out in enumerate(itertools.islice(self._outs, world)):
            env = {**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(self._start(arguments, env, out, file_bytes=(file_bytes or {}).get(rank)))
        codes = [self._wait(pid) for pid in started]  # of all, before one's words are read and would be lost
        return [Ended(code, *self._printed(pid)) for code, pid in zip(codes, started, strict=True)]

    def _start(
        self,
        arguments: list[str],
        environment: Mapping[str, str],
        out: Path,
        err: Path | None = None,
        folder: Path = REPOSITORY,
        file_bytes: int | None = None,
    ) -> int:
        started = self._ask(
            arguments=arguments,
            environment=dict(environment),
            folder=str(folder),
            out=str(out),
            err=str(err or out),
            file_bytes=file_bytes,
        )
        pid = int(started["pid"])
        self._running.add(pid)
        self._unread[pid] = [out] if err is None else [out, err]
        return pid

    def _wait(self, pid: int) -> int:
        code = int(self._ask(wait=pid)["code"])
        self._running.remove(pid)
        return code

    def _printed(self, pid: int) -> list[str]:
        """What a process that is over has printed, once."""
        return [read(out) for out in self._unread.pop(pid)]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return self._answer()
        except BaseException:  # a test that ran out of time: its answer must not be taken for the next one's
            self._end_with_stacks()
            self._server.kill()
            self.close()
            self._begin()
            raise

    def _end_with_stacks(self) -> None:
        """Ends what still runs, and prints what it and its fellows have said and where it was."""
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # faulthandler's, in warm_server.py
        time.sleep(2)
        for pid in list(self._unread):
            how = "ended by its test" if pid in self._running else "over"
            print(f"process {pid}, {how}:", *self._printed(pid), sep="\n")
        self._running.clear()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        return dict(json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """Ends the server."""
        for stream in (self._server.stdin, self._server.stdout):
            if stream is not None:
                stream.close()
        self._server.wait(30)


def read(out: Path) -> str:
    """What a process that is over has printed, once."""
    text = out.read_text(encoding="utf-8")
    out.unlink()
    return text
