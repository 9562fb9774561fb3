"""What Lightning must know of parameters that are spread over ranks, however they are used."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for parameters that are DTensors, with this project's checkpoints.

    `TrainingModule.configure_model` gives each trainee to `shard`. States are those of torch's own `state_dict`, their
    tensors spread as the parameters are: the same values under the same names as in a run whose parameters are whole,
    so that any trainer goes on from any checkpoint.

    Args:
        data_parallel_size: ranks that read different rows; "auto": one a machine.
        tensor_parallel_size: ranks that read the same rows; "auto": those of one machine.
    """

    @abstractmethod
    def shard(self, trainee: nn.Module) -> None:
        """Replaces parameters (and state along latents) of a trainee by this rank's part of them."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Names and values of the module's state; spread tensors are DTensors."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over what `load_checkpoint` has read for this rank."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Parameters by number, as without this strategy."""
        return (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes over what `load_checkpoint` has read for this rank."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Every rank writes its part."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this rank's part of a checkpoint of any form, saved by any number of ranks."""
        io: Any = self.checkpoint_io
        return io.load_checkpoint(checkpoint_path, weights_only=weights_only, place=self._place)  # type: ignore[no-any-return]

    def _place(self, keys: tuple[Any, ...], stored: Tensor) -> DTensor | None:
        """The tensor of this run that is spread as one of a checkpoint shall be; None where it shall be whole."""
        like: Any = None
        if keys[0] == "state_dict":
            module = self.lightning_module
            assert module is not None
            like = {**dict(module.named_parameters()), **dict(module.named_buffers())}.get(keys[1])
        elif keys[0] == "optimizer_states" and keys[2] == "state":
            groups = self.optimizers[keys[1]].param_groups
            like = [parameter for group in groups for parameter in group["params"]][keys[3]]
        return like if isinstance(like, DTensor) and like.shape == stored.shape else None
