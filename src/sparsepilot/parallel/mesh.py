"""The ranks as a grid. Those of one line read the same rows and hold different latents; those of one column hold the
same latents and read different rows:

                features 0   features 1
        data 0    rank 0       rank 1
        data 1    rank 2       rank 3

Without dictionary parallelism the grid is one column: every rank has rows of its own and the whole dictionary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DATA, FEATURES = "data", "features"


class Group(NamedTuple):
    """Some of the ranks, this one among them."""

    size: int = 1
    rank: int = 0
    """this process's number in it"""
    handle: dist.ProcessGroup | None = None
    """torch's; None: that of all ranks"""


ONE = Group()
"""This process by itself."""

_grid: DeviceMesh | None = None
_alone: list[bool] = [False]


def arrange(num_shards: int, cuda: bool) -> None:
    """Lays out the ranks that have met, `num_shards` to a line; call it on all of them, once."""
    global _grid
    if num_shards == 1 or not dist.is_initialized():
        return
    shape = (dist.get_world_size() // num_shards, num_shards)
    _grid = init_device_mesh("cuda" if cuda else "cpu", shape, mesh_dim_names=(DATA, FEATURES))


def forget() -> None:
    """The ranks have let go of each other."""
    global _grid
    _grid = None


def grid() -> DeviceMesh | None:
    """The grid as torch's own object; None where it is one column."""
    return _grid


def world() -> Group:
    """All ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return ONE
    return Group(dist.get_world_size(), dist.get_rank())


def data() -> Group:
    """The ranks of this one's column, among which rows are dealt out."""
    if _alone[-1]:
        return ONE
    return world() if _grid is None else _of(_grid, DATA)


def features() -> Group:
    """The ranks of this one's line, among which latents are dealt out."""
    return ONE if _grid is None else _of(_grid, FEATURES)


def everyone() -> Group:
    """All ranks whose rows and latents belong to this one's batch."""
    return features() if _alone[-1] else world()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this rank's rows are all the rows there are."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def _of(grid: DeviceMesh, dimension: str) -> Group:
    handle = grid.get_group(dimension)
    return Group(handle.size(), grid.get_local_rank(dimension), handle)
