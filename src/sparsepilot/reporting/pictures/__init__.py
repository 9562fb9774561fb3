"""The pictures of a run: each module here with a `draw(run) -> Picture` is one, in the order of their `PLACE`.

A new picture is a new file. `draw` takes what a run folder holds and returns numbers and labels; where the rows that it
needs are not there, a panel says what would make them. Several runs are drawn over one another by overlay.py.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module

from sparsepilot.reporting.figure import Picture
from sparsepilot.reporting.runs import Run

Draw = Callable[[Run], Picture]


def registered() -> list[Draw]:
    """The `draw` of every picture, in the order of a report."""
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return [module.draw for module in sorted(modules, key=lambda module: module.PLACE)]
