"""What a run's bits depend on beside its configuration."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("sparsepilot", "torch", "lightning", "zarr", "torchmetrics", "hydra-core", "wandb", "numpy")


def environment() -> dict[str, Any]:
    """Versions, threads and the git commit: what a run's bits depend on beside its configuration."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
