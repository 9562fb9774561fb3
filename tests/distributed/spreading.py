"""Four ranks save tensors that are spread in every way that a mesh allows, or one to four read them, spread otherwise.

python tests/distributed/spreading.py save <folder>
python tests/distributed/spreading.py load <folder>
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sparsepilot.callbacks.checkpoint_io import CrashSafeIO
from sparsepilot.parallel import agreement
from sparsepilot.parallel.collectives import num_ranks

WHOLE: dict[str, Tensor] = {
    "rows": torch.arange(14.0).view(7, 2),
    "on both dimensions": torch.arange(30).view(6, 5),
    "rows, on both dimensions": torch.arange(10, dtype=torch.bfloat16).view(5, 2),
    "fewer rows than ranks": torch.arange(2.0, dtype=torch.float64),
    "on a part of the mesh": torch.arange(9.0) * 3,
    "everywhere": torch.arange(3.0) - 1,
}


def spread() -> dict[str, Tensor]:
    """WHOLE on a mesh of 2 x 2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "features"))
    layouts = {
        "rows": (mesh, [Replicate(), Shard(0)]),
        "on both dimensions": (mesh, [Shard(1), Shard(0)]),
        "rows, on both dimensions": (mesh, [Shard(0), Shard(0)]),
        "fewer rows than ranks": (mesh, [Shard(0), Shard(0)]),
        "on a part of the mesh": (mesh["features"], [Shard(0)]),
    }
    return {
        name: distribute_tensor(tensor, *layouts[name]) if name in layouts else tensor for name, tensor in WHOLE.items()
    }


def load(path: Path) -> None:
    """Every tensor by rows over however many ranks there are; each rank compares its part."""
    mesh = init_device_mesh("cpu", (num_ranks(),))

    def place(keys: tuple[Any, ...], stored: Tensor) -> DTensor | None:
        return distribute_tensor(torch.empty_like(WHOLE[keys[1]]), mesh, [Shard(0)]) if keys[0] == "spread" else None

    loaded = CrashSafeIO().load_checkpoint(path, place=place)
    for name, tensor in WHOLE.items():
        mine = loaded["spread"][name]
        assert isinstance(mine, DTensor)
        assert torch.equal(mine.full_tensor(), tensor), name
    assert loaded["step"] == 7


if __name__ == "__main__":
    agreement.join(cuda=False)
    what, path = sys.argv[1], Path(sys.argv[2])
    if what == "save":
        CrashSafeIO().save_checkpoint({"spread": spread(), "step": 7, "groups": [{"betas": (0.9, None)}]}, path)
    else:
        load(path)
    agreement.leave()
