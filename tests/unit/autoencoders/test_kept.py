"""What a step keeps for its backward pass: nothing of the size of [batch, latents], on either path."""

from __future__ import annotations

import gc

import pytest
from shapes import ARCHITECTURES, BLOCKS, B, F, dead_ids, make, moment, rows
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparsepilot.autoencoders import base
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.prefixes import FixedPrefixes
from sparsepilot.autoencoders.revival import AuxK, PreActivation, Revival

PATHS = {"sparse": 1.0, "dense": 0.0}


def largest_kept(model: Autoencoder, dead: Tensor) -> int:
    """Elements of the largest tensor that a graph, or anything but the model itself, holds after a forward pass."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x_BD, y_BD = rows(model)
    gc.freeze()  # what is there before is not looked through: with pytest's own that is a million objects
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            step = model(x_BD, y_BD, moment(model, dead))
        tiles = {buffer.data_ptr() for buffer in model._workspace._buffers.values()}
        alive = [t for t in gc.get_objects() if type(t) is Tensor and t.data_ptr() not in tiles]
    finally:
        gc.unfreeze()
    step.loss.backward()
    return max(*sizes, *(tensor.numel() for tensor in alive))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("blocks", ["autoencoder", "cross-layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_dense_is_kept(architecture: str, blocks: str, path: str) -> None:
    revivals: list[Revival] = [AuxK(3), AuxK(60), PreActivation()]
    for revival in revivals:
        model = make(
            architecture,
            blocks,
            dense_above=PATHS[path],
            revival=revival,
            prefixes=FixedPrefixes([0.3]),
            tile_latents=32,
        )
        assert largest_kept(model, dead_ids(80)) < B * F * 80 // F


def test_one_tensor_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure itself: a dense path without recomputation does keep them."""
    monkeypatch.setattr(base, "checkpoint", lambda tile, *rows, **_: tile(*rows))
    model = make("topk", BLOCKS["autoencoder"], dense_above=0.0)
    assert largest_kept(model, dead_ids(0)) >= B * F
