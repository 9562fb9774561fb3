"""Hydra parses a YAML file once per process, and not at all in those forked from one that has: PyYAML in Python is a
fifth of a start, and tests start a thousand times."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult

CONF = Path(__file__).parents[1] / "conf"

_parsed: dict[tuple[str, str, int, int], ConfigResult] = {}
_parse = FileConfigSource.load_config


def _load_config(self: FileConfigSource, config_path: str) -> ConfigResult:
    full_path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
    if not os.path.exists(full_path):
        return _parse(self, config_path)  # which says so
    now = os.stat(full_path)
    key = (self.provider, full_path, now.st_mtime_ns, now.st_size)
    if key not in _parsed:
        _parsed[key] = _parse(self, config_path)
    return copy.deepcopy(_parsed[key])  # Hydra changes what it is given


def parse_once() -> None:
    """From here on, in this process."""
    FileConfigSource.load_config = _load_config  # type: ignore[method-assign]


def parse_ahead() -> None:
    """All of conf/, for the processes to be forked."""
    parse_once()
    source = FileConfigSource("main", f"file://{CONF}")
    for file in sorted(CONF.rglob("*.yaml")):
        source.load_config(str(file.relative_to(CONF)))
