"""A composed configuration as plain values."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """Dicts, lists, numbers and strings: interpolations resolved, an enum by its name."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
