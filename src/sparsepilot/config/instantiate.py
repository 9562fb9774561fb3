"""Hydra's `instantiate`, with this project's own errors coming through as they are."""

from __future__ import annotations

from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from sparsepilot.errors import SparsepilotError


def instantiate(node: Any, **given: Any) -> Any:
    """Builds `node`; what its constructor refuses is raised as it is, not inside a report about the call."""
    try:
        return hydra.utils.instantiate(node, **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, SparsepilotError):
            raise error.__cause__ from None
        raise
