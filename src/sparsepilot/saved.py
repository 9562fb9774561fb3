"""What a run folder's own small files say; a damaged one is one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sparsepilot.errors import ConfigError
from sparsepilot.run_folder import RunFolder

_GROUPS = ("data", "lm")
"""Groups of a configuration that those who read it later look into."""


def read_config(folder: RunFolder) -> dict[str, Any]:
    """The resolved configuration of a run; `data` and `lm` are objects, empty where they are missing.

    Raises:
        ConfigError: when config.yaml is missing, damaged, or no configuration of a run.
    """
    config = _object(folder.config, lambda: OmegaConf.to_container(OmegaConf.load(folder.config)))
    if "data" not in config:
        raise ConfigError(f"{folder.config}: is no configuration of a run; it has no data")
    for group in _GROUPS:
        config[group] = {} if config.get(group) is None else config[group]
        if not isinstance(config[group], dict):
            raise ConfigError(f"{folder.config}: {group} is {config[group]!r}, an object with fields is needed")
    return config


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """summary.json with its `metrics` and `environment`, each empty where it is missing, as in a run not ended.

    Raises:
        ConfigError: when it is damaged.
    """
    summary = read_object(folder.summary) if folder.summary.exists() else {}
    for name in ("metrics", "environment"):
        if not isinstance(summary.setdefault(name, {}), dict):
            raise ConfigError(f"{folder.summary}: {name} is {summary[name]!r}, an object with fields is needed")
    return summary


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises ConfigError when it is missing, damaged or holds anything else."""
    return _object(path, lambda: json.loads(path.read_text(encoding="utf-8")))


def _object(path: Path, read: Callable[[], Any]) -> dict[str, Any]:
    try:
        value = read()
    except Exception as error:  # of the disk, of JSON, of YAML and of OmegaConf, each with errors of its own
        raise ConfigError(f"{path}: is damaged ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, an object with fields is needed")
    return value
