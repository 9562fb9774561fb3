"""How the ranks of a run agree: rank 0 acts and tells, anyone may ask to stop, an error is said once.

All of it goes over a group of its own on CPU, so that no decision waits for a device.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sparsepilot import ranks
from sparsepilot.errors import ConfigError, RankError, SaidElsewhere, SparsepilotError
from sparsepilot.parallel import mesh

T = TypeVar("T")

WAIT = datetime.timedelta(days=7)
"""Rank 0 may build a cache while the others wait. That a rank is gone shows by its closed connection, not by time."""
LINGER_S, SPEAK_S = 3.0, 1.0
GONE = "another rank of this run is gone; started again, it goes on from the last checkpoint"

_control: dist.ProcessGroup | None = None
_store: Store | None = None


def join(cuda: bool) -> None:
    """Meets the other ranks, where there are any; blocks until all of them are there.

    Raises:
        ConfigError: when they are not within torch's half hour, or the port is another program's.
    """
    global _control, _store
    here = ranks.ranks_here()
    if here is None or dist.is_initialized():
        return
    ranks.adopt(here)
    try:
        store, number, world = next(rendezvous("env://"))
    except dist.DistError as error:
        place, why = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", " ".join(str(error).split())
        raise ConfigError(f"MASTER_ADDR:MASTER_PORT = {place}: {here.world} ranks cannot meet there ({why})") from error
    _store = PrefixStore("sparsepilot", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=number, world_size=world)
    _control = dist.new_group(backend="gloo", timeout=WAIT) if cuda else dist.new_group(timeout=WAIT)
    ranks.may_say.append(_say_once)


def leave() -> None:
    """The end of a run that went well: waits for the others and lets go of them."""
    global _control, _store
    if _control is None:
        return
    meet()
    dist.destroy_process_group()
    mesh.forget()
    _control = _store = None
    ranks.may_say.pop()


def meet() -> None:
    """Waits until every rank is here."""
    if _control is not None:
        dist.barrier(group=_control)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank; it runs there alone.

    Raises:
        SaidElsewhere: on the others, where it raised on rank 0.
    """
    if _control is None:
        return make()
    told: list[Any] = [None]
    if mesh.world().rank == 0:
        try:
            told = [(True, make())]
        except BaseException:
            dist.broadcast_object_list([(False, None)], src=0, group=_control)
            raise
    dist.broadcast_object_list(told, src=0, group=_control)
    went_well, value = told[0]
    if not went_well:
        _let_first_speak()
        raise SaidElsewhere("rank 0 could not go on")
    return value  # type: ignore[no-any-return]


def from_all(value: T) -> list[T]:
    """Every rank's value, in rank order."""
    if _control is None:
        return [value]
    values: list[Any] = [None] * mesh.world().size
    dist.all_gather_object(values, value, group=_control)
    return values


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Of each flag, whether a rank has raised it."""
    if _control is None:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=_control)
    return [bool(flag) for flag in raised.tolist()]


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Turns what torch says of a rank that is gone into a RankError."""
    try:
        yield
    except Exception as error:
        if _lost_a_rank(error):
            raise RankError(GONE) from error
        raise


def _lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(error, SparsepilotError):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _let_first_speak() -> None:
    """Gives rank 0 time to say what is wrong: srun ends all ranks as soon as one has ended."""
    if _store is None:
        return
    with contextlib.suppress(RuntimeError):  # it is gone, and has said it
        _store.add("ending", 1)
    time.sleep(SPEAK_S)


def _say_once(line: str) -> bool:
    """Ranks that find the same at the same time: the first one says it."""
    if _store is None:
        return True
    try:
        first = bool(_store.add(f"said {line}", 1) == 1)
        _store.add("ending", 1)
        if mesh.world().rank == 0:  # the store ends with rank 0: give the others time to ask it
            until_s = time.monotonic() + LINGER_S
            while _store.add("ending", 0) < mesh.world().size and time.monotonic() < until_s:
                time.sleep(0.05)
    except RuntimeError:
        return True  # rank 0 is gone, who knows what it said
    return first
