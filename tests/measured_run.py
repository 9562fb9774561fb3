"""A run in a process of its own that says how much memory it took: python tests/measured_run.py OVERRIDE ...

Prints one line of JSON: `base_bytes`, resident once everything is imported and before anything is built, and
`peak_bytes`, the most that was resident from then on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sparsepilot.estimate.report import compose_config
from sparsepilot.process_memory import ask_for_huge_pages
from sparsepilot.run import train


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main() -> None:
    """Trains what the command line says."""
    ask_for_huge_pages()  # as train.py does
    cfg = compose_config(Path(__file__).resolve().parents[1] / "conf", sys.argv[1:])
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew from here
    base = status_bytes("VmRSS")
    train(cfg)
    print(json.dumps({"base_bytes": base, "peak_bytes": status_bytes("VmHWM")}))


if __name__ == "__main__":
    main()
