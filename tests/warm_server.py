"""Imports torch, Lightning and the rest once, then forks a process for each run that is asked for.

A start of train.py is five seconds of imports and one of training. Forked, the imports are there already; all else is
as in a process of its own: arguments, environment, working directory, signals, exit status, kill -9. Nothing has
started a thread before the fork (the client checks), so the children may start theirs.

Requests and answers are lines of JSON: {"arguments", "environment", "folder", "out", "file_bytes"} -> {"pid"};
{"wait": pid} -> {"code"}.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Serves until stdin closes."""
    import sparsepilot.data.synthetic
    import sparsepilot.run  # noqa: F401

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
            return  # the interpreter ends as that of any script
        print(json.dumps({"pid": pid}), flush=True)


def become(request: dict[str, Any]) -> None:
    """Turns this forked process into `python <arguments>`."""
    for name, descriptor in ((os.devnull, 0), (request["out"], 1), (request["out"], 2)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
