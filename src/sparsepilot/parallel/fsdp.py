"""FSDP2: every rank keeps a part of the latents; for a step each of them holds the whole dictionary."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from sparsepilot.parallel.sharded import Sharded


class FullySharded(Sharded):
    """Parameters, gradients, optimizer state and checkpoints are spread over ranks, latent by latent.

    Before a step the ranks gather the whole dictionary, after it each adds up its part of the gradient. The traffic is
    that of DDP, and a step needs the memory of a whole dictionary and of its gradient; what is kept in between is
    divided by the number of ranks.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self) -> None:
        """Every rank reads rows of its own."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, trainee: nn.Module) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(trainee, mesh=mesh)  # torch keeps what it has gathered for `forward` until `backward` has used it
        for module in trainee.modules():
            for name in getattr(module, "latent_buffers", ()):
                setattr(module, name, distribute_tensor(getattr(module, name), mesh, [Shard(0)], src_data_rank=None))
