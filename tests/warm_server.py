"""Imports torch, Lightning and the rest once, then forks a process for each run that is asked for.

A start of train.py is five seconds of imports and one of training. Forked, the imports are there already; all else is
as in a process of its own: arguments, environment, working directory, signals, exit status, kill -9. Nothing has
started a thread before the fork (the client checks), so the children may start theirs.

Requests and answers are lines of JSON: {"arguments", "environment", "folder", "out", "err", "file_bytes"} -> {"pid"};
{"wait": pid} -> {"code"}.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

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
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    sys.argv = request["arguments"]
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


if __name__ == "__main__":
    main()
