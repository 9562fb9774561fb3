"""A dictionary inside the language model, on held-out text: what its reconstruction costs, special tokens and all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsepilot.analysis.pairs import coded
from sparsepilot.analysis.quality import Quality
from sparsepilot.errors import ConfigError, NonFiniteError
from sparsepilot.interop.dictionary import Dictionary
from sparsepilot.lm.capture import capture
from sparsepilot.lm.held_out import Contexts
from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import TextBatch, chunks, clustered_se, spread

_FEWEST_CONTEXTS = 2
_WITH_KL = ("reconstruction", "zero_everywhere")
"""Of what takes the site's place, that which is compared with the clean model's whole distribution."""


class TextFigures(NamedTuple):
    """What `measure_text` gives."""

    text: dict[str, int]
    with_special_tokens: dict[str, float]
    without_special_tokens: dict[str, float]
    language_model: dict[str, float]
    sae_lens: dict[str, float]


@torch.no_grad()
def measure_text(
    sae: Dictionary,
    seam: Seam,
    contexts: Contexts,
    mean_D: Tensor,
    *,
    tokens: int | None = 10_000,
    batch_contexts: int = 4,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TextFigures:
    """Runs contexts through the language model with several things in the site's place.

    Reconstruction: over the rows (every position that a cache would hold), and over these and the special ones: BOS and
    the separators between documents, whose activations no cache has. What comes after a context's last row is left out.

    Behaviour: `ce` and so on are those of `lm.splice.SplicedCrossEntropy`, on predictions at rows of a next token of
    the same document; special positions keep their own activations. Means are over the chosen predictions.

    `sae_lens` holds what its `evals` and SAEBench's core evaluation call by these names, on our rows and predictions.
    Where they differ from ours: the ablation is zeros at all positions, the special ones too; `mse` is summed over
    dimensions; explained variance is about the mean of the measured rows.

    Each batch of contexts runs up to the site once, and from there on once for each of: clean, reconstruction, zeros,
    mean, zeros everywhere. Nothing is kept between batches.

    Args:
        sae: reads the seam's `read` and writes its `write`.
        seam: the language model, cut at the site.
        contexts: held-out text.
        mean_D: [d_out] mean of the written site over the training rows, raw.
        tokens: predictions at least, spread evenly; all where there are fewer, or None.
        batch_contexts: contexts per pass.
        progress: is told batches done, of how many.

    Raises:
        ConfigError: where the text is too short.
        NonFiniteError: when the cross-entropy is NaN or infinite.
    """
    predicted_CL = contexts.predicted_CL
    counts_C = predicted_CL.sum(axis=1)
    useful_C = np.flatnonzero(counts_C)
    if len(useful_C) < _FEWEST_CONTEXTS:
        raise ConfigError(
            f"the cache's held-out rows make predictions in {len(useful_C)} contexts; at least {_FEWEST_CONTEXTS} are "
            "needed: hold out more text (data.build.val_fraction) in another cache"
        )
    most = int(counts_C.sum())
    chosen = useful_C[spread(counts_C[useful_C], most if tokens is None else min(tokens, most))]
    num_batches = -(-len(chosen) // batch_contexts)
    batches = [TextBatch.of(contexts, predicted_CL, chosen[b::num_batches]) for b in range(num_batches)]

    d_sae = sae.cfg["d_sae"]
    every, rows = Quality(mean_D, d_sae), Quality(mean_D, d_sae)
    sums = _Sums()
    device, lm_device = sae.W_dec.device, seam.lm.device
    every.to(device), rows.to(device)
    with torch.autocast(device.type, enabled=False), torch.autocast(lm_device.type, enabled=False):
        for number, batch in enumerate(batches):
            kept = seam.keep(batch.tokens_CL)
            shown_A = torch.from_numpy(_up_to_last_row(contexts.mask_CL[chosen[number::num_batches]]))
            x_AD = kept.read_ND[shown_A.to(kept.read_ND.device)]
            if seam.read == seam.write:
                y_AD = x_AD
            else:
                y_AD = capture(seam.lm, [seam.write], batch.tokens_CL)[seam.write][shown_A.to(lm_device)]
            is_row_A = torch.isin(shown_A, batch.rows_R)
            y_hat_RD = []
            for part in coded(sae, x_AD):
                y_BD, own_B = y_AD[part.rows].to(device, torch.float32), is_row_A[part.rows].to(device)
                every.update(y_BD, part.y_hat_BD, part.ids_P)
                rows.update(y_BD[own_B], part.y_hat_BD[own_B], part.ids_P[own_B[part.rows_P]])
                y_hat_RD.append(part.y_hat_BD[own_B])
            _behave(seam, kept, batch, torch.cat(y_hat_RD), mean_D, sums)
            progress(number + 1, num_batches)
    sizes_S = np.concatenate([batch.part_sizes for batch in batches])
    num = int(sizes_S.sum())
    language_model = sums.language_model(
        num,
        sizes_S,
        np.concatenate([batch.documents_S for batch in batches]),
        np.concatenate([batch.contexts_S for batch in batches]),
    )
    without = rows.figures()
    return TextFigures(
        {"num_contexts": len(chosen), "num_predictions": num},
        every.figures(),
        without,
        language_model,
        _as_sae_lens(without, sae.cfg["d_out"], language_model, sums.means(num)),
    )


def _up_to_last_row(mask_CL: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Flat positions of the contexts, each up to its last row; what follows is padding, or nobody knows what."""
    return np.flatnonzero(np.flip(np.logical_or.accumulate(np.flip(mask_CL, 1), axis=1), 1))


def _behave(seam: Seam, kept: Any, batch: TextBatch, y_hat_RD: Tensor, mean_D: Tensor, sums: _Sums) -> None:
    """Adds one batch's losses with each thing in the site's place."""
    everywhere_N = torch.arange(kept.tokens_CL.numel())
    in_place: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "clean": (None, None),
        "reconstruction": (batch.rows_R, y_hat_RD),
        "zero": (batch.rows_R, torch.zeros_like(y_hat_RD)),
        "mean": (batch.rows_R, mean_D.to(y_hat_RD).expand(len(y_hat_RD), -1)),
        "zero_everywhere": (everywhere_N, y_hat_RD.new_zeros(len(everywhere_N), y_hat_RD.shape[1])),
    }
    at_P = batch.predictions_P.to(seam.lm.device)
    states = {name: seam.states(kept, rows, y)[at_P] for name, (rows, y) in in_place.items()}
    found: dict[str, list[Tensor]] = {}
    for chunk in chunks(len(at_P)):
        clean_NV = p_NV = torch.empty(0)
        for name, states_PD in states.items():
            log_NV = torch.log_softmax(seam.logits(states_PD[chunk]), dim=1)
            targets_N1 = batch.targets_P[chunk, None].to(log_NV.device)
            found.setdefault(name, []).append(-log_NV.gather(1, targets_N1)[:, 0])
            if name == "clean":
                clean_NV, p_NV = log_NV, log_NV.exp()
            elif name in _WITH_KL:
                kl_N = (p_NV * clean_NV.sub(log_NV)).sum(dim=1)
                found.setdefault(f"kl_{name}", []).append(kl_N)
    for name, values in found.items():
        parts = torch.split(torch.cat(values).double().cpu(), batch.part_sizes)
        sums.add(name, [float(part.sum()) for part in parts])


class _Sums:
    """Sums over predictions, by document and context."""

    def __init__(self) -> None:
        self._of: dict[str, list[float]] = {}

    def add(self, name: str, parts: list[float]) -> None:
        self._of.setdefault(name, []).extend(parts)

    def means(self, num: int) -> dict[str, float]:
        """Over all predictions."""
        return {name: math.fsum(parts) / num for name, parts in self._of.items()}

    def language_model(
        self, num: int, sizes_S: NDArray[np.int64], documents_S: NDArray[np.int64], contexts_S: NDArray[np.int64]
    ) -> dict[str, float]:
        """The figures of `lm.splice.SplicedCrossEntropy`."""
        of = self.means(num)
        clean, ce = of["clean"], of["reconstruction"]
        if not math.isfinite(ce):
            raise NonFiniteError(f"ce is {ce}: the language model with the reconstruction gives no finite loss")
        clusters_S = documents_S if len(np.unique(documents_S)) > 1 else contexts_S
        differences_S = np.array(self._of["reconstruction"]) - np.array(self._of["clean"])
        figures = {
            "ce": ce,
            "ce_se": clustered_se(differences_S, sizes_S, clusters_S),
            "ce_clean": clean,
            "ce_zero": of["zero"],
            "ce_mean": of["mean"],
            "kl": of["kl_reconstruction"],
        }
        return figures | {
            name: value
            for name, ablated in (("ce_recovered", of["zero"]), ("ce_recovered_mean", of["mean"]))
            for value in _recovered(clean, ce, ablated)
        }


def _recovered(clean: float, value: float, ablated: float) -> Iterator[float]:
    """The share of an ablation's harm that is undone; nothing where it does none."""
    if ablated > clean:
        yield (ablated - value) / (ablated - clean)


def _as_sae_lens(
    rows: dict[str, float], d_out: int, language_model: dict[str, float], of: dict[str, float]
) -> dict[str, float]:
    """SAELens's names and conventions."""
    figures = {
        "l0": rows["l0"],
        "explained_variance": 1 - rows["fvu_own_mean"],
        "mse": rows["mse"] * d_out,
        "cossim": rows["cosine"],
        "l2_ratio": rows["norm_ratio"],
        "ce_loss_without_sae": language_model["ce_clean"],
        "ce_loss_with_sae": language_model["ce"],
        "ce_loss_with_ablation": of["zero_everywhere"],
        "kl_div_with_sae": of["kl_reconstruction"],
        "kl_div_with_ablation": of["kl_zero_everywhere"],
    }
    scores = (
        ("ce_loss_score", _recovered(of["clean"], of["reconstruction"], of["zero_everywhere"])),
        ("kl_div_score", _recovered(0.0, of["kl_reconstruction"], of["kl_zero_everywhere"])),
    )
    return figures | {name: value for name, found in scores for value in found}
