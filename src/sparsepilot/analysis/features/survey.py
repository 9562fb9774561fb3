"""One pass over a cache: how often and how strongly each latent fires, and where.

Memory, for F latents, whatever the number of rows: F * (8 * 2 + 8 * NUM_BINS + (TOP + SAMPLE) * (20 + 8 * WIDTH)) bytes
of state (9.6 kB a latent: 158 MB for 16,384, 630 MB for 65,536), and while rows are digested some 200 bytes for each of
DIGEST_PAIRS active pairs, and those of one piece of PIECE_ROWS more. No matrix of [rows, latents] is ever made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sparsepilot.analysis.features.kept import AFTER, BEFORE, NO_TOKEN, WIDTH, Kept, random_keys, top_keys
from sparsepilot.analysis.features.sparse_codes import SparseEncoder
from sparsepilot.data.cache import Cache
from sparsepilot.errors import DataError
from sparsepilot.ops.select import Pairs
from sparsepilot.run_folder import replacing

TOP = 20
"""Contexts kept of each latent, by their largest activation: some more than are shown, as texts repeat themselves."""
SAMPLE = 12
"""Firings kept of each latent, drawn uniformly: what its lower quantiles are shown from."""
BINS_PER_OCTAVE, LOWEST_OCTAVE, NUM_OCTAVES = 4, -10, 24
NUM_BINS = BINS_PER_OCTAVE * NUM_OCTAVES
PIECE_ROWS = 2048
DIGEST_PAIRS = 2**21


def bin_edges() -> NDArray[np.float64]:
    """[NUM_BINS + 1] edges of the activation histogram: each octave in four equal parts, from 2^-10 to 2^14.

    What lies outside is counted in the outermost bins.
    """
    octaves = 2.0 ** np.arange(LOWEST_OCTAVE, LOWEST_OCTAVE + NUM_OCTAVES)
    inside = 1 + np.arange(BINS_PER_OCTAVE) / BINS_PER_OCTAVE
    return np.append((octaves[:, None] * inside).reshape(-1), 2.0 ** (LOWEST_OCTAVE + NUM_OCTAVES))


def bins_of(values_P: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bins of positive activations: exponent and the first two bits of the mantissa are the bin."""
    bits_P = np.ascontiguousarray(values_P, dtype=np.float32).view(np.int32).astype(np.int64)
    bins_P: NDArray[np.int64] = np.clip((bits_P >> 21) - BINS_PER_OCTAVE * (127 + LOWEST_OCTAVE), 0, NUM_BINS - 1)
    return bins_P


class Labels(NamedTuple):
    """Token, position and document of consecutive rows."""

    tokens_B: NDArray[np.int32]
    positions_B: NDArray[np.int32]
    documents_B: NDArray[np.int32]


class Survey:
    """What a pass has gathered of the rows before `next_row`.

    Rows are taken in pieces of whole contexts, so what is gathered does not depend on where pieces end.

    Attributes:
        fires_F: [F] int64, rows on which a latent is active.
        sum_F: [F] fp64, its activations added up.
        histogram_FH: [F, NUM_BINS] int64, see `bin_edges`.
        token_counts_V: [V] int64, how often each token occurs in the rows.
        top: the contexts of the largest activations, each context once at its largest.
        sample: firings drawn uniformly.
    """

    def __init__(self, num_latents: int, vocabulary: int) -> None:
        self.next_row = 0
        self.fires_F = np.zeros(num_latents, dtype=np.int64)
        self.sum_F = np.zeros(num_latents, dtype=np.float64)
        self.histogram_FH = np.zeros((num_latents, NUM_BINS), dtype=np.int64)
        self.token_counts_V = np.zeros(vocabulary, dtype=np.int64)
        self.top = Kept(num_latents, TOP)
        self.sample = Kept(num_latents, SAMPLE)

    @property
    def num_latents(self) -> int:
        return len(self.fires_F)

    def digest(self, first_row: int, labels: Labels, pairs: Pairs) -> None:
        """Adds consecutive rows from `first_row` on that begin and end with a context, and their active pairs."""
        num_rows = len(labels.tokens_B)
        order_P = np.argsort(pairs.ids_P.numpy() * num_rows + pairs.rows_P.numpy())
        latent_P, row_P = pairs.ids_P.numpy()[order_P], pairs.rows_P.numpy()[order_P]
        value_P = pairs.values_P.numpy()[order_P]
        self.fires_F += np.bincount(latent_P, minlength=self.num_latents)
        self.sum_F += np.bincount(latent_P, weights=value_P, minlength=self.num_latents)
        flat_P = latent_P * NUM_BINS + bins_of(value_P)
        self.histogram_FH += np.bincount(flat_P, minlength=self.histogram_FH.size).reshape(self.histogram_FH.shape)
        self.token_counts_V += np.bincount(labels.tokens_B, minlength=len(self.token_counts_V))

        best_C = _best_of_contexts(latent_P, row_P, value_P, labels.positions_B)
        keys_C = top_keys(value_P[best_C], first_row + row_P[best_C])
        self._keep(self.top, best_C, keys_C, first_row, labels, latent_P, row_P, value_P)
        all_P = np.arange(len(latent_P))
        self._keep(
            self.sample, all_P, random_keys(latent_P, first_row + row_P), first_row, labels, latent_P, row_P, value_P
        )
        self.next_row = first_row + num_rows

    @staticmethod
    def _keep(
        kept: Kept,
        pair_C: NDArray[np.int64],
        keys_C: NDArray[np.uint64],
        first_row: int,
        labels: Labels,
        latent_P: NDArray[np.int64],
        row_P: NDArray[np.int64],
        value_P: NDArray[np.float32],
    ) -> None:
        if not len(pair_C):
            return
        placed = kept.place(latent_P[pair_C], keys_C)
        pair_A, at = pair_C[placed.candidates_A], (placed.latents_A, placed.slots_A)
        kept.row_FN[at] = first_row + row_P[pair_A]
        kept.value_FN[at] = value_P[pair_A]
        tokens_AW = _texts(row_P[pair_A], labels)
        kept.token_FNW[at] = tokens_AW
        kept.value_FNW[at] = np.where(tokens_AW == NO_TOKEN, 0, _activations(pair_A, latent_P, row_P, value_P))

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Writes all of it, or nothing."""
        with replacing(path, "wb") as file:
            np.savez(file, allow_pickle=False, identity=np.array(json.dumps(identity)), **self._arrays())

    def restore(self, path: Path, identity: Mapping[str, Any]) -> bool:
        """Takes up what `save` wrote, and says whether it was there and of the same identity.

        Raises:
            DataError: when the file is damaged.
        """
        if not path.is_file():
            return False
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
                if json.loads(str(saved["identity"])) != json.loads(json.dumps(identity)):
                    return False
                for name, array in self._arrays().items():
                    if name != "next_row":
                        array[...] = saved[name]
                self.next_row = int(saved["next_row"])
        except Exception as error:  # of the disk, zip, zlib, JSON and numpy, each with errors of its own
            said = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{path}: is damaged ({said}); remove it and start again") from error
        return True

    def _arrays(self) -> dict[str, NDArray[Any]]:
        own = {name: getattr(self, name) for name in ("fires_F", "sum_F", "histogram_FH", "token_counts_V")}
        for name, kept in (("top", self.top), ("sample", self.sample)):
            own |= {f"{name}.{array}": getattr(kept, array) for array in Kept.ARRAYS}
        return {**own, "next_row": np.array(self.next_row)}


def _best_of_contexts(
    latent_P: NDArray[np.int64],
    row_P: NDArray[np.int64],
    value_P: NDArray[np.float32],
    positions_B: NDArray[np.int32],
) -> NDArray[np.int64]:
    """Of pairs sorted by latent and row, the first of the largest within each latent and context."""
    if not len(latent_P):
        return np.empty(0, dtype=np.int64)
    context_B = np.cumsum(np.diff(positions_B, prepend=positions_B[:1] + 1) <= 0)
    group_P = latent_P * (int(context_B[-1]) + 1) + context_B[row_P]
    starts_C = np.flatnonzero(np.diff(group_P, prepend=-1))
    best_C = np.maximum.reduceat(value_P, starts_C)
    of_P = np.repeat(np.arange(len(starts_C)), np.diff(np.append(starts_C, len(group_P))))
    hits = np.flatnonzero(value_P == best_C[of_P])
    return hits[np.diff(of_P[hits], prepend=-1) > 0]


def _texts(row_A: NDArray[np.int64], labels: Labels) -> NDArray[np.int32]:
    """[A, WIDTH] tokens around rows; NO_TOKEN where the row that far away is of another document or context."""
    offsets_W = np.arange(-BEFORE, AFTER + 1)
    near_AW = row_A[:, None] + offsets_W
    inside_AW = (near_AW >= 0) & (near_AW < len(labels.tokens_B))
    near_AW = np.where(inside_AW, near_AW, 0)
    inside_AW &= labels.documents_B[near_AW] == labels.documents_B[row_A][:, None]
    inside_AW &= labels.positions_B[near_AW] - labels.positions_B[row_A][:, None] == offsets_W
    return np.where(inside_AW, labels.tokens_B[near_AW], NO_TOKEN).astype(np.int32)


def _activations(
    pair_A: NDArray[np.int64],
    latent_P: NDArray[np.int64],
    row_P: NDArray[np.int64],
    value_P: NDArray[np.float32],
) -> NDArray[np.float32]:
    """[A, WIDTH] activations of each pair's latent on the rows around its own: the pairs beside it in the order."""
    values_AW = np.zeros((len(pair_A), WIDTH), dtype=np.float32)
    values_AW[:, BEFORE] = value_P[pair_A]
    for step, reach in ((-1, BEFORE), (1, AFTER)):
        open_A = np.arange(len(pair_A))
        for far in range(1, reach + 1):
            other_A = pair_A[open_A] + step * far
            there_A = (other_A >= 0) & (other_A < len(latent_P))
            open_A, other_A = open_A[there_A], other_A[there_A]
            distance_A = row_P[other_A] - row_P[pair_A[open_A]]
            near_A = (latent_P[other_A] == latent_P[pair_A[open_A]]) & (np.abs(distance_A) <= reach)
            open_A = open_A[near_A]
            if not len(open_A):
                break
            values_AW[open_A, BEFORE + distance_A[near_A]] = value_P[other_A[near_A]]
    return values_AW


class Reader:
    """Whole contexts of a cache, piece by piece, with their active pairs."""

    def __init__(self, cache: Cache, sites: list[str], encoder: SparseEncoder, num_rows: int) -> None:
        self._cache, self._sites, self._encoder, self._num_rows = cache, sites, encoder, num_rows

    def gather(self, first_row: int) -> tuple[Labels, Pairs]:
        """Rows from `first_row`, where a context begins, to the end of a shard or to DIGEST_PAIRS pairs, about.

        `rows_P` counts from there.
        """
        shard_rows = self._cache.manifest.plan.shard_rows
        end = min(self._num_rows, (first_row // shard_rows + 1) * shard_rows)
        labels: list[Labels] = []
        found: list[Pairs] = []
        row, num_pairs = first_row, 0
        while row < end and num_pairs < DIGEST_PAIRS:
            piece = self._piece(row)
            stop = row + len(piece.tokens_B)
            x_BD = torch.cat([self._cache.read(site, row, stop).float() for site in self._sites], dim=1)
            pairs = self._encoder(x_BD)
            found.append(pairs._replace(rows_P=pairs.rows_P + (row - first_row)))
            labels.append(piece)
            row, num_pairs = stop, num_pairs + len(pairs.ids_P)
        return Labels(*map(np.concatenate, zip(*labels, strict=True))), Pairs(
            *(torch.cat(part) for part in zip(*found, strict=True))
        )

    def _piece(self, start: int) -> Labels:
        """Labels of some PIECE_ROWS rows from `start`, ending where a context does; of a longer one what fits."""
        ahead = min(start + PIECE_ROWS + 1, self._num_rows)
        positions_B = self._cache.positions(start, ahead)
        stop = ahead
        if ahead < self._num_rows:
            begins = np.flatnonzero(np.diff(positions_B) <= 0) + 1
            stop = start + int(begins[-1]) if len(begins) else start + PIECE_ROWS
        return Labels(self._cache.tokens(start, stop), positions_B[: stop - start], self._cache.documents(start, stop))
