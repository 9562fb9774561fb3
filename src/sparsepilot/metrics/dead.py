"""Dead latents: those that have not fired on any rank for a window of samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def dead_window_samples(total_samples: int) -> int:
    """min(10M, 10% of the budget): the window after which a silent latent counts as dead.

    >>> dead_window_samples(2_000_000), dead_window_samples(10**9)
    (200000, 10000000)
    """
    return min(10_000_000, total_samples // 10)


class DeadLatents(Metric):
    """For every latent the sample clock at which it last fired; dead is silent for more than `window_samples`.

    The state is persistent (it is saved with the run) and merged over ranks by maximum.

    >>> metric = DeadLatents(d_sae=3, window_samples=100)
    >>> metric.update(torch.tensor([1, 0, 0]), samples=150)
    >>> metric.compute().tolist()
    2
    """

    full_state_update = False
    last_fired_F: Tensor
    samples: Tensor

    def __init__(self, d_sae: int, window_samples: int) -> None:
        super().__init__()
        self.window_samples = window_samples
        self.add_state("last_fired_F", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="max", persistent=True)
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max", persistent=True)

    def update(self, firings_F: Tensor, samples: int) -> None:
        """Marks the latents that fired.

        Args:
            firings_F: [F] int64, on how many rows of the batch each latent is active.
            samples: the clock after this batch, over all ranks.
        """
        self.last_fired_F.masked_fill_(firings_F > 0, samples)
        self.samples.fill_(samples)

    def dead_mask(self) -> Tensor:
        """[F] bool on this rank's state."""
        return self.samples - self.last_fired_F > self.window_samples

    def silent_mask(self, since_samples: int) -> Tensor:
        """[F] bool: latents that have not fired after the clock stood at `since_samples`."""
        return self.last_fired_F <= since_samples

    def compute(self) -> Tensor:
        return self.dead_mask().sum()
