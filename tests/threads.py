"""Threads as the ranks among which a dictionary's latents are dealt out: their collectives wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsepilot.ops import select
from sparsepilot.parallel.latents import Shard
from sparsepilot.parallel.mesh import Group

T = TypeVar("T")


class Line:
    """So many threads; `everyone` of BatchTopK is these, and the ranks that read other rows are this thread alone."""

    def __init__(self, size: int, monkeypatch: Any) -> None:
        self.size = size
        self._barrier, self._local, self._given = threading.Barrier(size, timeout=60), threading.local(), [None] * size
        self.messages: list[int] = []
        """numbers in each message of the first thread"""
        monkeypatch.setattr(select, "everyone", lambda: Group(size if hasattr(self._local, "rank") else 1))
        for name, over_line in (
            ("all_reduce_sum_", self.sum_), ("all_reduce_max_", self.max_),
            ("all_gather_concat", lambda values: torch.cat(self.all(values))),
        ):  # fmt: skip
            monkeypatch.setattr(select, name, partial(self._over_line, over_line))

    def shard(self, d_sae: int, rank: int) -> Shard:
        return _Shard(d_sae, rank, self)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What `work(rank)` gives in each thread; the first error of any is raised."""
        found: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self._local.rank = rank
            try:
                found[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            self._barrier.reset()
            raise errors[0]
        return found

    def _over_line(self, collective: Callable[[Tensor], Tensor], values: Tensor, group: Group | None = None) -> Tensor:
        """Outside of the threads a process is alone, and so is each of them among the readers of its rows."""
        return values if group is None or not hasattr(self._local, "rank") else collective(values)

    def all(self, values: Tensor) -> list[Tensor]:
        rank = self._local.rank
        if rank == 0:
            self.messages.append(values.numel())
        self._given[rank] = values.detach().clone()
        self._barrier.wait()
        parts = [given.clone() for given in self._given]
        self._barrier.wait()
        return parts

    def sum_(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.all(values)).sum(0))

    def max_(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.all(values)).amax(0))


class _Shard(Shard):
    def __init__(self, d_sae: int, rank: int, line: Line) -> None:
        super().__init__(d_sae, Group(line.size, rank))
        self.line = line

    def sum_(self, part: Tensor) -> Tensor:
        return self.line.sum_(part)

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack(self.line.all(values))

    def exchange(self, values: Tensor) -> Tensor:
        return torch.stack(self.line.all(values))[:, self.ranks.rank]
