"""Imports torch, Lightning and the rest once, then forks a process for each run that is asked for.

A start of train.py is five seconds of imports and one of training. Forked, the imports are there already; all else is
as in a process of its own: arguments, environment, working directory, signals, exit status, kill -9. Nothing has
started a thread before the fork (the client checks), so the children may start theirs. Where such a process starts
Python itself, as one does that starts its ranks, that is forked from it (Forked).

Requests and answers are lines of JSON: {"arguments", "environment", "folder", "out", "err", "file_bytes"} -> {"pid"};
{"wait": pid} -> {"code"}.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import inspect
import itertools
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from parsed_once import parse_ahead

MODULES = (
    *("sparsepilot.run", "sparsepilot.config.cli", "sparsepilot.data.synthetic", "sparsepilot.reporting.report"),
    *("sparsepilot.analysis.features.build", "sparsepilot.lm.load", "transformers.models.llama.modeling_llama"),
    *("hydra._internal.logging_config", "submitit.slurm.slurm", "zarrs.pipeline", "numpy.ctypeslib"),
)


def main() -> None:
    """Serves until stdin closes."""
    for name in MODULES:
        with contextlib.suppress(ImportError):  # the [lm] extra is not installed
            importlib.import_module(name)
    parse_ahead()
    num_threads = len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").exists() else 1
    print(json.dumps({"threads": num_threads}), flush=True)
    gc.freeze()  # children would copy what they never use, page by page, each time they collect garbage
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become(request)
        print(json.dumps({"pid": pid}), flush=True)


def become(request: dict[str, Any]) -> NoReturn:
    """Turns this forked process into `python <arguments>`."""
    for name, descriptor in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    faulthandler.enable()  # SIGABRT: where every thread is
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    subprocess.Popen = Forked  # type: ignore[misc]
    run(request["arguments"])


def run(arguments: Sequence[str]) -> NoReturn:
    """What `python <arguments>` does, and then the end of this process."""
    sys.argv = list(arguments)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        if not isinstance(leaving.code, int | None):
            raise
        status = leaving.code or 0
    # any other exception ends the interpreter, which prints it; else this is what the interpreter does, but for taking
    # all modules apart: that copies a third of the memory that was forked
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


class Forked(subprocess.Popen[Any]):
    """A child as any other, with pipes, a session and signals of its own; `python <script>` is forked, not executed."""

    def _execute_child(self, *given: Any) -> None:
        whole = super()._execute_child  # type: ignore[misc]
        asked = inspect.signature(whole).bind(*given).arguments
        program, *words = asked["args"]
        words = list(itertools.dropwhile(lambda word: word.startswith("-"), words))  # as `-B`
        if program != sys.executable or not words or not words[0].endswith(".py"):
            whole(*given)
            return
        self.pid = os.fork()
        if self.pid == 0:
            self._become(asked, words)
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in PIPES))  # type: ignore[attr-defined]

    def _become(self, asked: dict[str, Any], arguments: Sequence[str]) -> NoReturn:
        for name, descriptor in (("p2cread", 0), ("c2pwrite", 1), ("errwrite", 2)):
            if asked[name] != -1:
                os.dup2(asked[name], descriptor)
        os.closerange(3, 1024)  # the pipes to its siblings, too, which are to end with the process that started them
        if asked["start_new_session"]:
            os.setsid()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked["cwd"] is not None:
            os.chdir(asked["cwd"])
        if asked["env"] is not None:
            os.environ.clear()
            os.environ.update(asked["env"])
        forget_hydra()
        try:
            run(arguments)
        except BaseException:  # it would go on in the frames of the process that was forked
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)


PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def forget_hydra() -> None:
    """The process that forked this one has composed a configuration."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


if __name__ == "__main__":
    main()
