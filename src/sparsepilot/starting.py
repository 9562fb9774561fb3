"""Beginning from a dictionary that is there already: `model.init_from`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.interop.fold import PER_ROW, unfold
from sparsepilot.interop.load import load
from sparsepilot.training.trainee import Trainee

SAME_NORM = 1e-3
"""Decoder rows whose norms differ by less, relatively, have one norm."""


class Origin(NamedTuple):
    """A dictionary to begin from, and how the user called it."""

    path: str
    dictionary: Dictionary


def load_origin(path: str | None) -> Origin | None:
    """What `model.init_from` names: anything that `sparsepilot.load` reads; None where it names nothing.

    Raises:
        ConfigError: when it cannot be loaded.
    """
    if path is None:
        return None
    try:
        return Origin(path, load(path))
    except CheckpointError as error:
        raise ConfigError(f"model.init_from = {path}: {error}") from error


def begin_from(origin: Origin, trainee: Trainee) -> list[str]:
    """Gives a fresh trainee the weights of a dictionary for raw activations, in the units of its training.

    A dictionary of the same architecture reconstructs in step 0 as it did; another one only lends its weights, and so
    does a TopK whose decoder rows had several norms (they are 1 in training). Both are said.

    Returns:
        Notes for the user.

    Raises:
        ConfigError: when the shapes are not those of the run, or only one of the two is gated.
    """
    autoencoder, given = trainee.autoencoder, origin.dictionary.cfg
    mine = autoencoder.inference_config(trainee.controller.strength)
    for field, remedy in _REMEDIES.items():
        there, here = given.get(field, 1), mine[field]
        if there != here and not (field == "skip" and not there):
            raise ConfigError(
                f"model.init_from = {origin.path}: {field} is {there!r} there and {here!r} here; {remedy}"
            )
    if (given["architecture"] == "gated") != (mine["architecture"] == "gated"):
        raise ConfigError(
            f"model.init_from = {origin.path}: is {given['architecture']}, the run {mine['architecture']}; a gated "
            "dictionary has weights that the others have not"
        )
    mean_in_D = torch.zeros_like(trainee.scale_in) if autoencoder.blocks.same else autoencoder.mean_in
    tensors = unfold(given, origin.dictionary.tensors(), trainee.scale_in, trainee.scale_out, mean_in_D)
    norms_F = tensors.pop("norms")
    mask_FD = autoencoder.blocks.decoder_mask(autoencoder.d_sae)
    if mask_FD is not None and bool(tensors["W_dec"][~mask_FD].any()):
        raise ConfigError(
            f"model.init_from = {origin.path}: has latents that write layers before the one that they read"
        )
    autoencoder.adopt(tensors)
    return _notes(given, mine, float(norms_F.min()), float(norms_F.max()))


_REMEDIES = {
    "blocks": "model.sites says what is read and written",
    "layers": "model.sites says what is read and written",
    "d_in": "model.sites must be of that width",
    "d_out": "model.sites must be of that width",
    "d_sae": "set model.d_sae to it",
    "skip": "set model.skip=true",
}
"""What must be equal, and what to do where it is not."""


def _notes(given: dict[str, object], mine: dict[str, object], smallest: float, largest: float) -> list[str]:
    notes = []
    there, here = given["architecture"], mine["architecture"]
    if there != here and {there, here} != {"batchtopk", "jumprelu"}:
        notes.append(f"it was {there}, the run is {here}: its weights are taken, which latents are active is not")
    elif there in PER_ROW and largest > smallest * (1 + SAME_NORM):
        notes.append(
            f"its decoder rows have norms {smallest:.3g} to {largest:.3g} here and become 1; others may be active"
        )
    if "k" in given and "k" in mine and given["k"] != mine["k"]:
        notes.append(f"it had k = {given['k']}, the run has {mine['k']}")
    return notes
