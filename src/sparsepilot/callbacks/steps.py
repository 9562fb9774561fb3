"""Where a callback stands within gradient accumulation."""

from __future__ import annotations

import lightning as L


def ended_optimizer_step(trainer: L.Trainer) -> bool:
    """In `on_train_batch_end`: whether this micro-batch closed an optimizer step."""
    return not trainer.fit_loop._should_accumulate()
