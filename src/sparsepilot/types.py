"""The few types that cross borders, and the legend of the shape suffixes used all over the code.

B  rows of one micro-batch on one rank (a row is one token position)
D  input width: the widths of all sites that a batch carries, side by side
F  latents of a dictionary (d_sae)
K  active latents per row
N  rows of a cache
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch as the loader yields it."""

    x_BD: Tensor
    """[B, D] raw activations (unscaled, fp32/bf16/fp16), the sites of the run side by side."""
    first_sample: int
    """Position of the *global* batch's first row on the sample clock; names the rows when something goes wrong."""
    num_streams: int = 1
    """The rows are those of so many streams, one after the other, equally many of each."""
