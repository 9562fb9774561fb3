"""What a dictionary's reconstruction costs the language model, in nats per predicted token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sparsepilot.errors import ConfigError, NonFiniteError
from sparsepilot.lm.held_out import Contexts
from sparsepilot.lm.seam import Kept, Seam
from sparsepilot.parallel.collectives import all_reduce_sum_, num_ranks, rank

Reconstruct = Callable[[Tensor], Tensor]
"""[N, D] raw fp32 activations of the site that is read -> [N, D'] raw reconstructions of the site that is written"""

_LEAST_CONTEXTS = 2  # a standard error needs two
_MOST_APART = 2.0  # factor between the increases on the whole set and on its subset that is believed
_LOGITS_OF = 256  # positions whose logits exist at a time: 50 MB with a vocabulary of 49,000, 260 MB with 256,000


class SplicedCrossEntropy:
    """Cross-entropy of a language model with reconstructions in place of a site's activations, on held-out text.

    Every row position of the contexts is replaced; BOS, separators and padding are not. Cross-entropy is the mean of
    -log p(next token) over a fixed set of n predictions (`Contexts.predicted_CL`), in nats:

    - `ce`: with the reconstruction; `ce_clean`: of the model as it is; `ce_zero`, `ce_mean`: with zeros, and with the
      site's mean over the training rows, in the place of the reconstruction.
    - `ce_recovered` = (ce_zero - ce) / (ce_zero - ce_clean), as SAELens and SAEBench define it: 1 where nothing is
      lost, 0 where zeros do as well. `ce_recovered_mean` is the same with ce_mean, which is much the stricter: most of
      what zeros break is the mean. Left out where the ablation does no harm.
    - `ce_se`: standard error of ce - ce_clean, paired by token and clustered by document, as tokens of one document
      are alike: with G documents, d_g the sum of their differences, n_g their predictions and d = sum d_g / n,
      se^2 = G / (G - 1) * sum_g (d_g - n_g d)^2 / n^2 (the ratio estimator of cluster sampling, Cochran 1977, section
      11.8). Contexts take the place of documents where there are fewer than two. It says how well the set stands for
      other text; two measurements of one run are on the same tokens and compare far more closely.
    - `kl`: mean of KL(clean || spliced) over the same predictions.

    The set is spread evenly over the contexts given. A smaller one for measurements that are made `often` is the first
    batches of it, spread in the same way; there `ce` is the whole set's ce_clean plus the subset's difference, times
    `correction`: the ratio of the two sets' differences in the last measurement of the whole, which gives it. So both
    stand on one scale, though a small set has a bias of its own.

    A batch has the same contexts whatever the ranks and the measurement; ranks share out batches, and sums travel by
    document and context before they are added up. So all ranks hold the same number, and as many ranks as one.

    What the clean model and the ablations lose is computed once, and kept as sums by document and context.

    Memory beside the model, shared out over ranks: what enters the layers above the site, C * L * D numbers in the
    model's dtype (as much again where another site is read), and some 40 bytes per position for tokens and indices
    (10,000 predictions of SmolLM2: 12 MiB); logits of 256 positions at a time. `kept_bytes` is the number after the
    first measurement.

    Args:
        seam: the model, cut at the site.
        contexts: held-out text.
        mean_D: mean of the written site over the training rows, raw.
        tokens: predictions at least.
        often_tokens: of measurements made often, at least; None: all.
        batch_contexts: contexts per pass.
        kl: whether the last measurement gives `kl`.

    Raises:
        ConfigError: where the text is too short.
    """

    def __init__(
        self,
        seam: Seam,
        contexts: Contexts,
        mean_D: Tensor,
        *,
        tokens: int,
        often_tokens: int | None = None,
        batch_contexts: int = 4,
        kl: bool = True,
    ) -> None:
        self.seam, self._mean_D, self._kl = seam, mean_D, kl
        predicted_CL = contexts.predicted_CL
        counts_C = predicted_CL.sum(axis=1)
        useful_C = np.flatnonzero(counts_C)
        chosen = useful_C[spread(counts_C[useful_C], tokens)]
        self.batches: list[TextBatch] = []
        num_batches = -(-len(chosen) // batch_contexts)
        for number in range(num_batches):
            own = chosen[number::num_batches]  # each batch spread over the whole
            self.batches.append(TextBatch.of(contexts, predicted_CL, own))
        self.num_contexts = len(chosen)
        self.num_tokens = sum(batch.num_predictions for batch in self.batches)
        self._num_often = num_batches
        if often_tokens is not None:
            so_far = np.cumsum([batch.num_predictions for batch in self.batches])
            fewest = -(-_LEAST_CONTEXTS // batch_contexts)
            self._num_often = min(num_batches, max(fewest, 1 + int(np.searchsorted(so_far, often_tokens))))
        self.num_often_tokens = sum(batch.num_predictions for batch in self.batches[: self._num_often])
        self._own: list[_Own] | None = None
        self._clean = self._zero = self._mean = np.zeros(0)

    @torch.no_grad()
    def measure(
        self,
        reconstruct: Reconstruct,
        *,
        often: bool = False,
        correction: float = 1.0,
        last: bool = False,
        device: torch.device | None = None,
    ) -> dict[str, float]:
        """The figures above, equal on all ranks. The first call also runs the clean model and the ablations.

        Args:
            reconstruct: of the dictionary, as at inference.
            often: on the smaller set.
            correction: of a measurement made often, as the last one of the whole set has given it.
            last: whether this is the one measurement that gives `kl`, for as much time again.
            device: of `reconstruct`; None: the language model's.

        Raises:
            NonFiniteError: when the cross-entropy is NaN or infinite.
        """
        device = device or self.seam.lm.device
        with torch.autocast(device.type, enabled=False), torch.autocast(self.seam.lm.device.type, enabled=False):
            if self._own is None:
                self._prepare(device)
            batches = self.batches[: self._num_often] if often else self.batches

            def spliced(own: _Own) -> Tensor:
                x_RD = own.kept.read_ND.index_select(0, own.batch.rows_R.to(own.kept.read_ND.device))
                return reconstruct(x_RD.to(device, torch.float32))

            sums_S, kl_S = self._run(batches, spliced, device, kl=self._kl and last)
        figures = self._figures(batches, sums_S, kl_S, correction if often else 1.0)
        return figures if often else {**figures, "correction": self._correction(sums_S)}

    def _correction(self, sums_S: NDArray[np.float64]) -> float:
        differences_S = sums_S - self._clean
        sizes_S = np.concatenate([batch.part_sizes for batch in self.batches])
        num_often = sum(len(batch.part_sizes) for batch in self.batches[: self._num_often])
        whole = differences_S.sum() / sizes_S.sum()
        subset = differences_S[:num_often].sum() / sizes_S[:num_often].sum()
        alike = whole > 0 and subset > 0
        return float(np.clip(whole / subset, 1 / _MOST_APART, _MOST_APART)) if alike else 1.0

    @property
    def kept_bytes(self) -> int:
        """Bytes that this process keeps between measurements for its passes."""
        return sum(own.kept.num_bytes for own in self._own or ())

    # ------------------------------------------------------------------------------------------------ passes

    def _prepare(self, device: torch.device) -> None:
        """What each batch starts from, and the figures that do not depend on the dictionary."""
        mine = range(rank(), len(self.batches), num_ranks())
        self._own = [_Own(self.batches[i], self.seam.keep(self.batches[i].tokens_CL)) for i in mine]
        self._clean, _ = self._run(self.batches, None, device)
        mean_D = self._mean_D.to(device, torch.float32)
        for name, y_D in (("_zero", torch.zeros_like(mean_D)), ("_mean", mean_D)):
            sums_S, _ = self._run(self.batches, lambda own, y=y_D: y.expand(len(own.batch.rows_R), -1), device)  # type: ignore[misc]
            setattr(self, name, sums_S)

    def _run(
        self,
        batches: list[TextBatch],
        spliced: Callable[[_Own], Tensor] | None,
        device: torch.device,
        kl: bool = False,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Sums over the predictions of each part of the batches: of -log p, and of KL where it is asked for."""
        assert self._own is not None
        sums: dict[int, Tensor] = {}
        for own in self._own:
            if any(own.batch is batch for batch in batches):
                sums[id(own.batch)] = self._pass(own, None if spliced is None else spliced(own), kl)
        # zeros where another rank's batches are: adding them leaves every bit as it is
        found = [
            sums.get(id(batch), torch.zeros(2, len(batch.part_sizes), dtype=torch.float64)).to(device)
            for batch in batches
        ]
        total_2S = all_reduce_sum_(torch.cat(found, dim=1)).cpu().numpy()
        return total_2S[0], total_2S[1] if kl else None

    def _pass(self, own: _Own, y_RD: Tensor | None, kl: bool) -> Tensor:
        """[2, parts] fp64: one batch's sums."""
        seam, batch = self.seam, own.batch
        states_PD = seam.states(own.kept, batch.rows_R, y_RD)[batch.predictions_P.to(seam.lm.device)]
        clean_PD = seam.states(own.kept)[batch.predictions_P.to(seam.lm.device)] if kl else None
        losses, kls = [], []
        for chunk in chunks(len(states_PD)):
            logits_NV = seam.logits(states_PD[chunk])
            targets_N = batch.targets_P[chunk].to(logits_NV.device)
            losses.append(functional.cross_entropy(logits_NV, targets_N, reduction="none").double().cpu())
            if clean_PD is not None:
                clean_NV = torch.log_softmax(seam.logits(clean_PD[chunk]), dim=1)
                differing_NV = clean_NV - torch.log_softmax(logits_NV, dim=1)
                kls.append((clean_NV.exp() * differing_NV).sum(dim=1).double().cpu())
        sums = [[part.sum() for part in torch.split(torch.cat(values), batch.part_sizes)] if values else None
                for values in (losses, kls)]  # fmt: skip
        zero = torch.zeros(len(batch.part_sizes), dtype=torch.float64)
        return torch.stack([zero if parts is None else torch.stack(parts) for parts in sums])

    # ------------------------------------------------------------------------------------------------ figures

    def _figures(
        self,
        batches: list[TextBatch],
        sums_S: NDArray[np.float64],
        kl_S: NDArray[np.float64] | None,
        correction: float,
    ) -> dict[str, float]:
        sizes_S = np.concatenate([batch.part_sizes for batch in batches])
        differences_S = (sums_S - self._clean[: len(sums_S)]) * correction
        difference = float(differences_S.sum() / sizes_S.sum())
        clean = float(self._clean.sum() / self.num_tokens)
        zero, mean = (clean + float((s - self._clean).sum()) / self.num_tokens for s in (self._zero, self._mean))
        ce = clean + difference
        if not math.isfinite(ce):
            raise NonFiniteError(f"val/ce is {ce}: the language model with the reconstruction gives no finite loss")
        documents_S = np.concatenate([batch.documents_S for batch in batches])
        if len(np.unique(documents_S)) < 2:
            documents_S = np.concatenate([batch.contexts_S for batch in batches])
        figures = {
            "ce": ce,
            "ce_se": clustered_se(differences_S, sizes_S, documents_S),
            "ce_clean": clean,
            "ce_zero": zero,
            "ce_mean": mean,
        }
        for name, ablated in (("ce_recovered", zero), ("ce_recovered_mean", mean)):
            if ablated > clean:
                figures[name] = (ablated - ce) / (ablated - clean)
        if kl_S is not None:
            figures["kl"] = float(kl_S.sum() / sizes_S.sum())
        return figures


class TextBatch(NamedTuple):
    """Contexts that are always run together."""

    tokens_CL: Tensor
    rows_R: Tensor
    """flat positions that a reconstruction replaces"""
    predictions_P: Tensor
    """flat positions whose prediction of the next token counts"""
    targets_P: Tensor
    part_sizes: list[int]
    """predictions of each part: those of one document in one context, in the order of `predictions_P`"""
    documents_S: NDArray[np.int64]
    contexts_S: NDArray[np.int64]

    @property
    def num_predictions(self) -> int:
        return len(self.predictions_P)

    @classmethod
    def of(cls, contexts: Contexts, predicted_CL: NDArray[np.bool_], chosen: NDArray[np.int64]) -> TextBatch:
        tokens_CL = contexts.tokens_CL[chosen].astype(np.int64)
        predictions_P = np.flatnonzero(predicted_CL[chosen])
        documents_P = contexts.documents_CL[chosen].reshape(-1)[predictions_P].astype(np.int64)
        contexts_P = chosen[predictions_P // tokens_CL.shape[1]]
        begins_S = np.flatnonzero(np.diff(documents_P, prepend=-1) | np.diff(contexts_P, prepend=-1))
        return cls(
            torch.from_numpy(tokens_CL),
            torch.from_numpy(np.flatnonzero(contexts.mask_CL[chosen])),
            torch.from_numpy(predictions_P),
            torch.from_numpy(tokens_CL.reshape(-1)[predictions_P + 1]),
            np.diff(begins_S, append=len(predictions_P)).tolist(),
            documents_P[begins_S],
            contexts_P[begins_S],
        )


class _Own(NamedTuple):
    """A batch of this rank, and what its passes start from."""

    batch: TextBatch
    kept: Kept


def clustered_se(sums_S: NDArray[np.float64], sizes_S: NDArray[np.int64], clusters_S: NDArray[np.int64]) -> float:
    """Standard error of sum(sums_S) / sum(sizes_S), clustered (formula above); inf for a single cluster.

    >>> one_each = np.ones(4, dtype=int)
    >>> round(clustered_se(np.array([1.0, 2.0, 3.0, 4.0]), one_each, np.arange(4)), 4)  # sd / sqrt(n)
    0.6455
    >>> round(clustered_se(np.array([1.0, 1.0, 3.0, 3.0]), one_each, np.array([7, 7, 9, 9])), 4)  # two, not four
    1.0
    """
    _, cluster_S = np.unique(clusters_S, return_inverse=True)
    sums_G, sizes_G = (np.bincount(cluster_S, weights=values_S) for values_S in (sums_S, sizes_S))
    num_clusters, num = len(sums_G), sizes_G.sum()
    if num_clusters < 2:
        return math.inf
    residual_G = sums_G - sizes_G * (sums_G.sum() / num)
    return float(np.sqrt(num_clusters / (num_clusters - 1) * np.square(residual_G).sum()) / num)


def spread(counts_C: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """The fewest evenly spaced contexts with `wanted` predictions among them."""
    num_contexts, total = len(counts_C), int(counts_C.sum())
    if total < wanted or num_contexts < _LEAST_CONTEXTS:
        raise ConfigError(
            f"cross_entropy.tokens = {wanted}: the cache's held-out rows make {total} predictions in {num_contexts} "
            f"contexts; {wanted} in at least {_LEAST_CONTEXTS} are needed: ask for fewer, or hold out more text "
            "(data.build.val_fraction) in another cache"
        )
    for num in range(max(_LEAST_CONTEXTS, wanted // int(counts_C.max())), num_contexts):
        chosen = np.arange(num) * num_contexts // num
        if counts_C[chosen].sum() >= wanted:
            return chosen
    return np.arange(num_contexts)


def chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + _LOGITS_OF) for start in range(0, length, _LOGITS_OF))
