"""Processes that start at once: forked from one that has imported torch, Lightning and the rest (warm_server.py)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from killing.runs import Ended

REPOSITORY = Path(__file__).resolve().parents[1]


class Warm:
    """Starts processes from the warm server; what `killing.runs.launch` does, five seconds sooner."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join(str(REPOSITORY / name) for name in ("benchmarks", "src"))
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "500"},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folder = folder
        assert self._answer() == {"threads": 1}

    def __call__(self, arguments: list[str], environment: Mapping[str, str], file_bytes: int | None = None) -> Ended:
        """One process, until it ends."""
        pid = self._start(arguments, environment, self._folder / "out.txt", file_bytes)
        return self._end(pid, self._folder / "out.txt")

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
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**environment, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        outs = [self._folder / f"out-{rank}.txt" for rank in range(world)]
        pids = []
        for rank, out in enumerate(outs):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            pids.append(self._start(arguments, env, out, (file_bytes or {}).get(rank)))
        return [self._end(pid, out) for pid, out in zip(pids, outs, strict=True)]

    def _start(self, arguments: list[str], environment: Mapping[str, str], out: Path, file_bytes: int | None) -> int:
        out.unlink(missing_ok=True)
        started = self._ask(
            arguments=arguments,
            environment=dict(environment),
            folder=str(REPOSITORY),
            out=str(out),
            file_bytes=file_bytes,
        )
        return int(started["pid"])

    def _end(self, pid: int, out: Path) -> Ended:
        code = self._ask(wait=pid)["code"]
        return Ended(code, out.read_text(encoding="utf-8"))

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        return dict(json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """Ends the server."""
        for stream in (self._server.stdin, self._server.stdout):
            if stream is not None:
                stream.close()
        self._server.wait(30)
