"""Dictionary parallelism: the ranks of a line of the grid read the same rows, each with latents of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparsepilot.parallel import mesh
from sparsepilot.parallel.ddp import DataParallel
from sparsepilot.parallel.latents import spread
from sparsepilot.parallel.shards import own


class FeatureParallel(DataParallel):
    """Parameters, gradients, optimizer state and the counters of latents are those of this rank's latents alone.

    What the ranks of a line tell each other in a step grows with batch and width, never with d_sae (docs/parallel.md):
    candidates of the selection, partial reconstructions, the gradient of b_dec. Several lines are data parallelism:
    each reads rows of its own, and the ranks of a column average the gradients of the latents that they share.

    In training the tensors are plain ones; in a checkpoint they are parts of the whole dictionary's (DTensors), so that
    any trainer goes on from it. `TrainingModule.per_latent` says which tensors have a row for each latent.

    Args:
        features: ranks among which the latents are dealt out, neighbours in rank; None: all ranks.
        gradients: as of `DataParallel`, between the ranks of a column.
    """

    def __init__(
        self, features: PositiveInt | None = None, gradients: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        super().__init__(gradients)
        self.features = features

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Among how many ranks rows are dealt out."""
        return {"num_replicas": mesh.data().size, "rank": mesh.data().rank}

    def configure_ddp(self) -> None:
        """Nothing where each rank has latents that nobody else has."""
        if mesh.data().size > 1:
            self._ddp_kwargs["process_group"] = mesh.data().handle
            super().configure_ddp()
            assert isinstance(self.model, DistributedDataParallel)

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """What a rank reads of a checkpoint is told by its parameters and its optimizer."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Names and values of the module's state, of whole dictionaries."""
        module: Any = self.lightning_module
        rows = module.per_latent()
        return {name: spread(value) if name in rows else value for name, value in module.state_dict().items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over what `load_checkpoint` has read for this rank."""
        assert self.lightning_module is not None
        state = {name: _local(value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Parameters by number, as without this strategy; what has their shape is spread as they are."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        rows = [parameter.shape if per_latent else None for parameter, per_latent in self._numbered(inner)]
        state["state"] = {
            number: {
                key: spread(value) if isinstance(value, Tensor) and value.shape == rows[number] else value
                for key, value in values.items()
            }
            for number, values in state["state"].items()
        }
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes over what `load_checkpoint` has read for this rank."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbered = {
                number: {key: _local(value) for key, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": numbered})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Every rank writes its part."""
        if mesh.grid() is None:
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)  # type: ignore[arg-type]
        else:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)  # type: ignore[arg-type]

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads this rank's part of a checkpoint of any form, saved by any number of ranks."""
        io: Any = self.checkpoint_io
        return io.load_checkpoint(checkpoint_path, weights_only=weights_only, place=self._place)  # type: ignore[no-any-return]

    def _place(self, keys: tuple[Any, ...], stored: Tensor) -> DTensor | None:
        """The tensor of this run that is spread as one of a checkpoint shall be; None where it shall be whole."""
        module: Any = self.lightning_module
        mine: Tensor | None = None
        if keys[0] == "state_dict" and keys[1] in module.per_latent():
            mine = module.state_dict()[keys[1]]
        elif keys[0] == "optimizer_states" and keys[2] == "state":
            parameter, per_latent = self._numbered(self.optimizers[keys[1]])[keys[3]]
            mine = parameter if per_latent else None
        like = None if mine is None else spread(mine)
        return like if isinstance(like, DTensor) and like.shape == stored.shape else None

    def _numbered(self, optimizer: Optimizer) -> list[tuple[nn.Parameter, bool]]:
        """The optimizer's parameters in order, and of each whether it has a row for each latent."""
        module: Any = self.lightning_module
        rows = module.per_latent()
        here = {id(parameter) for name, parameter in module.named_parameters() if name in rows}
        return [(p, id(p) in here) for group in optimizer.param_groups for p in group["params"]]


def _local(value: Any) -> Any:
    return own(value) if isinstance(value, torch.Tensor) else value
