"""What a step makes and drops again, counted tensor by tensor, against the formulas."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsepilot.estimate.calibration import reach_l0
from sparsepilot.estimate.dry import BareSteps
from sparsepilot.estimate.job import read_job
from sparsepilot.estimate.needs import rank_memory
from sparsepilot.estimate.wanted import Wanted

WIDTH = 128
SHAPES = {
    "wide": ("model.d_sae=8192", "batch=512"),
    "many rows": ("model.d_sae=2048", "batch=4096"),
}


class Counting(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and still there; `most` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(s) for s in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in given and id(storage) not in self._seen:
                self._add(storage)
        self.most = max(self.most, self._held)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            del self._seen[key]
            self._held -= size

        self._seen[key] = weakref.ref(storage, gone)
        self._held += size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def most_bytes(step: BareSteps) -> int:
    """Bytes that two steps hold at most beyond what was there before them, gradients left out: the first one's are
    counted as they are made, the second one's take their place."""
    with Counting() as counting:
        step()
        step()
    return counting.most - sum(p.grad.numel() * 4 for p in step.module.parameters() if p.grad is not None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("model", "l0", "dead"),
    [
        (("model=topk", "model.k=32"), None, 0.0),
        (("model=topk", "model.k=32", "optimizer=muon"), None, 0.0),
        (("model=topk", "model.k=8", "model.multi_topk=0.125"), None, 0.0),
        (("model=batchtopk", "model.k=32"), None, 0.0),
        (("model=matryoshka", "model.k=32"), None, 0.0),
        (("model=relu",), None, 0.0),
        (("model=relu",), 24.0, 0.0),
        (("model=jumprelu",), None, 0.0),
        (("model=jumprelu",), 24.0, 0.0),
        (("model=gated",), None, 0.0),
        (("model=topk", "model.k=32"), None, 0.25),
        (("model=topk", "model.k=32"), None, 0.75),
    ],
    ids=lambda value: " ".join(value).replace("model=", "") if isinstance(value, tuple) else str(value),
)
def test_a_step_holds_what_the_formulas_say(
    model: tuple[str, ...], l0: float | None, dead: float, shape: str, compose_cfg: Callable[..., DictConfig]
) -> None:
    cfg = compose_cfg(*model, *SHAPES[shape], "data=cache", "data.path=none", "data.sites=[site]", "logger=none")
    job = read_job(cfg, Wanted(d_in=WIDTH, l0=l0, dead=dead))
    if l0 is not None:  # once it has settled
        job = replace(job, dictionaries=tuple(d._replace(starts_dense=False) for d in job.dictionaries))
    step = BareSteps(cfg, job.data.widths)
    if l0 is not None:
        reach_l0(step, l0)
    for _, trainee in step.module.each():
        num_dead = round(dead * trainee.autoencoder.d_sae)
        trainee.dead.last_fired_F[:num_dead] = -(2**40)
        with torch.no_grad():
            trainee.autoencoder.b_enc[:num_dead] = -1e3  # and they never fire
    step()  # makes the optimizer's state and the workspace
    step()
    counted = most_bytes(step)
    parts = rank_memory(job).device
    said = parts.largest
    rest = sum(size for name, size in parts.lasting.items() if name in ("parameters", "gradients", "encoder product"))
    print(f"{model} {shape} L0 {l0}, dead {dead}: counted {counted / 2**20:.1f}, said {said / 2**20:.1f} MiB")
    assert abs(said - counted) / (rest + counted) < 0.1
    assert 0.7 < said / counted < 1.5
