"""What ranks measure of the same text: `python spliced_ranks.py OUT`, as torchrun would start it, writes OUT-<rank>."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import SplicedCrossEntropy


def measure() -> list[dict[str, float]]:
    """All of the text, and the part of it that is measured often."""
    from lm.test_splice import make, make_contexts

    seam = Seam(make("llama"), "model.layers.1", "model.layers.1")
    ce = SplicedCrossEntropy(seam, make_contexts(num=20), torch.ones(32), tokens=100, often_tokens=20, batch_contexts=2)

    def shrink(x_ND: Tensor) -> Tensor:
        return 0.8 * x_ND

    return [ce.measure(shrink, last=True), ce.measure(shrink, often=True)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.save(measure(), f"{sys.argv[1]}-{os.environ['RANK']}")
    torch.distributed.destroy_process_group()
