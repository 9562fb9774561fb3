"""train.py that counts what its rank gives to collectives in each optimizer step.

    WATCHED=<file> python tests/distributed/counted.py <what train.py takes>

A line of JSON per optimizer step: {"step", "dead", "messages": [[kind, bytes, ranks], ...]}. What ranks agree on over
their control group (a flag a step) is left out.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsepilot.parallel import agreement
from sparsepilot.training.module import TrainingModule

INPUT = {
    "all_reduce": 0, "reduce": 0, "broadcast": 0, "gather": 0, "scatter": 0, "send": 0, "all_gather": 1,
    "all_gather_into_tensor": 1, "all_gather_single": 1, "reduce_scatter": 1, "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1, "all_to_all": 1, "all_to_all_single": 1,
}  # fmt: skip
"""Collectives of torch, of any version, and which of their arguments is what a rank gives."""
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
messages: list[list[Any]] = []
original = TrainingModule.optimizer_step


def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, and a note of it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if group is None or group is not agreement._control:
            named = [kwargs[key] for key in ("tensor", "input_tensor", "input") if key in kwargs]
            given = args[INPUT[name]] if len(args) > INPUT[name] else named[0]
            tensors = [given] if isinstance(given, torch.Tensor) else given
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            kind = next((kind for kind in KINDS if name.startswith(kind)), name)
            messages.append([kind, num_bytes, dist.get_world_size(group)])
        return collective(*args, **kwargs)

    return call


def counted_step(
    self: TrainingModule, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
) -> None:
    """The step, and a line about it."""
    dead = sum(int(trainee.dead.dead_mask().sum()) for _, trainee in self.each())
    messages.clear()
    original(self, epoch, batch_idx, optimizer, optimizer_closure)
    line = {"step": self.step, "dead": dead, "messages": list(messages)}
    with open(os.environ["WATCHED"].format(rank=os.environ.get("RANK", "0")), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    for name in INPUT:
        if hasattr(dist, name):
            setattr(dist, name, counting(name, getattr(dist, name)))
    TrainingModule.optimizer_step = counted_step  # type: ignore[method-assign]
    script = Path(__file__).resolve().parents[2] / "train.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
