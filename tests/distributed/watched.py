"""train.py that writes down what its rank sees: which rows, and after each step the bits of all that ranks must share.

    WATCHED=<file> python tests/distributed/watched.py <what train.py takes>

A line of JSON per optimizer step: {"step", "rows", "state", "digests", "strength"}.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sparsepilot.training.module import TrainingModule

original = TrainingModule.optimizer_step


def digest(tensor: torch.Tensor) -> str:
    """Of the tensor's bits, over all ranks where it is spread."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def is_looked_at(tensor: torch.Tensor, step: int) -> bool:
    """What is spread has to be gathered first, and has few copies that could differ: now and then."""
    return not isinstance(tensor, DTensor) or step % 10 == 0


def watched_step(
    self: TrainingModule, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
) -> None:
    """The step, and a line about it."""
    seen: list[int] = []

    def closure() -> Any:
        result = optimizer_closure()
        loader, width = self.trainer.train_dataloader, self.batch // self.trainer.datamodule.num_streams
        for stream in loader.streams:
            start = self._micro_batches[0].first_sample // self.trainer.datamodule.num_streams
            rows = loader.order.rows(stream, start, start + width)
            seen.extend(int(row) for row in rows)
            where = (stream - loader.streams.start) * width // loader.accumulate
            # what was planned is what came: the first row of each stream, looked up in the cache
            came = self._micro_batches[0].x_BD[where]
            assert torch.equal(came, loader.cache.read(loader.sites[0], int(rows[0]), int(rows[0]) + 1)[0])
        return result

    original(self, epoch, batch_idx, optimizer, closure)
    missing = [name for name, p in self.named_parameters() if p.grad is None]
    state = {name: value for name, value in self.state_dict().items() if isinstance(value, torch.Tensor)}
    inner = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
    for number, moments in enumerate(inner.state.values()):
        state |= {f"{number}.{key}": value for key, value in moments.items() if isinstance(value, torch.Tensor)}
    line = {
        "step": self.step,
        "rows": seen,
        "digests": {name: digest(value) for name, value in state.items() if is_looked_at(value, self.step)},
        "strength": [trainee.controller.strength for _, trainee in self.each()],
        "without_gradient": missing,
    }
    with open(os.environ["WATCHED"].format(rank=os.environ.get("RANK", "0")), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    TrainingModule.optimizer_step = watched_step  # type: ignore[method-assign]
    script = Path(__file__).resolve().parents[2] / "train.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
