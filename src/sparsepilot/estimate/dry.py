"""A run's module without its data: for counting its tensors, and for timing its steps on random rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from sparsepilot.building import build_module
from sparsepilot.data.datamodule import RunData
from sparsepilot.data.statistics import SiteStats
from sparsepilot.training.module import TrainingModule
from sparsepilot.types import Batch

NUM_ROWS = 2**40
"""Of what stands in for a cache: more than any budget."""


class _Widths(NamedTuple):
    """What building a module asks a cache for."""

    widths: Mapping[str, int]
    num_train_rows: int = NUM_ROWS
    num_val_rows: int = NUM_ROWS

    def stats(self, site: str) -> SiteStats:
        """Rows of mean 0 and variance 1."""
        zeros_D = torch.zeros(self.widths[site], device="cpu")
        return SiteStats(zeros_D, zeros_D + 1, float(self.widths[site]), 1.0)

    def planted_features(self) -> Tensor | None:
        """None are known."""
        return None


class _NoData(NamedTuple):
    """Stands in for the datamodule where only the widths of its sites matter."""

    cache: _Widths

    @property
    def sites(self) -> list[str]:
        """In the order of their columns."""
        return list(self.cache.widths)


def dry_module(cfg: DictConfig, widths: Mapping[str, int], device: str = "meta") -> TrainingModule:
    """The module of a run over sites of these widths; on the device `meta` its tensors have shapes and no memory,
    however large they are. The language model is not loaded.

    Raises:
        ConfigError: as building the run would.
    """
    cfg = cfg.copy()
    cfg.cross_entropy = None
    with torch.device(device):
        return build_module(cfg, cast(RunData, _NoData(_Widths(widths))))


class BareSteps:
    """Training steps of a module called directly, on the same rows each time: no Lightning, no loader, no run folder.
    (Those take 1 to 3% of a step beside it, docs/benchmarks.md.)

    Args:
        cfg: a whole configuration; `batch` and `accumulate` say how many rows a micro-batch has.
        widths: of each site.
        device: where to run.
        x_BD: rows, at least as many as a micro-batch has; None: random ones.
    """

    def __init__(
        self, cfg: DictConfig, widths: Mapping[str, int], device: str = "cpu", x_BD: Tensor | None = None
    ) -> None:
        self.module = dry_module(cfg, widths, device)
        self.module.total_samples = NUM_ROWS
        self._optimizer: Optimizer = self.module.configure_optimizers()
        for group in self._optimizer.param_groups:
            group["lr"] = 1e-7  # nothing shall be learned: each step costs what the first one does
        rows = int(cfg.batch) // int(cfg.accumulate)
        if x_BD is None:
            x_BD = torch.randn(rows, sum(widths.values()), generator=torch.Generator().manual_seed(0))
        self.x_BD = x_BD[:rows].to(device)
        self._accumulate = int(cfg.accumulate)
        self._mixed = str(cfg.trainer.get("precision", "32-true")) == "bf16-mixed"

    def __call__(self) -> None:
        """One optimizer step, in Lightning's order."""
        module = self.module
        for micro in range(self._accumulate):
            with torch.autocast(self.x_BD.device.type, torch.bfloat16, enabled=self._mixed):
                loss = module.training_step(Batch(self.x_BD, module.samples), micro) / self._accumulate
            if micro == 0:
                self._optimizer.zero_grad()
            torch.autograd.backward(loss)
        module.on_before_optimizer_step(self._optimizer)
        self._optimizer.step()
        module.samples += module.batch
        for _, trainee in module.each():
            trainee.advance(module.samples)
        module._micro_batches.clear()
