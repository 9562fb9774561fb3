"""For each latent the n firings with the largest keys, each with the text around it: memory that does not grow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BEFORE, AFTER = 20, 11
WIDTH = BEFORE + 1 + AFTER
NO_TOKEN = -1


class Placed(NamedTuple):
    """Where accepted candidates belong."""

    candidates_A: NDArray[np.int64]
    """Their places among those offered."""
    latents_A: NDArray[np.int64]
    slots_A: NDArray[np.int64]


class Kept:
    """The n firings of each latent with the largest keys, whatever the order in which they come.

    A key is a positive uint64, unique within its latent; 0 marks an empty slot. The slots of a latent are in no
    particular order.

    Attributes:
        key_FN: [F, n] uint64.
        row_FN: [F, n] int64, row of the cache.
        value_FN: [F, n] fp32, activation there.
        token_FNW: [F, n, WIDTH] int32: the tokens from BEFORE before that row to AFTER after it, NO_TOKEN outside its
            document and context.
        value_FNW: [F, n, WIDTH] fp32: the latent's activations on these.
    """

    ARRAYS = ("key_FN", "row_FN", "value_FN", "token_FNW", "value_FNW")

    def __init__(self, num_latents: int, n: int) -> None:
        self.n = n
        self.key_FN = np.zeros((num_latents, n), dtype=np.uint64)
        self.row_FN = np.zeros((num_latents, n), dtype=np.int64)
        self.value_FN = np.zeros((num_latents, n), dtype=np.float32)
        self.token_FNW = np.full((num_latents, n, WIDTH), NO_TOKEN, dtype=np.int32)
        self.value_FNW = np.zeros((num_latents, n, WIDTH), dtype=np.float32)

    def place(self, latents_C: NDArray[np.int64], keys_C: NDArray[np.uint64]) -> Placed:
        """Makes room for the candidates that belong in here and sets their keys; the caller fills in the rest."""
        floor_F = self.key_FN.min(axis=1)
        offered_C = np.flatnonzero(keys_C > floor_F[latents_C])
        order_C = np.lexsort((~keys_C[offered_C], latents_C[offered_C]))
        offered_C = offered_C[order_C]
        latent_C, key_C = latents_C[offered_C], keys_C[offered_C]
        latents_U, first_U, of_C = np.unique(latent_C, return_index=True, return_inverse=True)
        rank_C = np.arange(len(latent_C)) - first_U[of_C]
        fits_C = rank_C < self.n  # of one latent, no more than there is room for
        new_UN = np.zeros((len(latents_U), self.n), dtype=np.uint64)
        new_UN[of_C[fits_C], rank_C[fits_C]] = key_C[fits_C]

        old_UN = self.key_FN[latents_U]
        cut_U1 = np.partition(np.concatenate([old_UN, new_UN], axis=1), self.n, axis=1)[:, self.n, None]
        enters_UN = (new_UN >= cut_U1) & (new_UN > 0)
        leaves_UN = (old_UN < cut_U1) | (old_UN == 0)
        leaves_UN &= np.cumsum(leaves_UN, axis=1) <= enters_UN.sum(axis=1, keepdims=True)
        user_A, rank_A = np.nonzero(enters_UN)
        _, slots_A = np.nonzero(leaves_UN)  # as many of each latent, latent by latent
        latents_A = latents_U[user_A]
        self.key_FN[latents_A, slots_A] = new_UN[user_A, rank_A]
        return Placed(offered_C[first_U[user_A] + rank_A], latents_A, slots_A)


def top_keys(values_C: NDArray[np.float32], rows_C: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys that order firings by activation, and equal ones by row, the first first."""
    bits_C: NDArray[np.uint64] = np.ascontiguousarray(values_C, dtype=np.float32).view(np.uint32).astype(np.uint64)
    before_C: NDArray[np.uint64] = np.uint64(0xFFFFFFFF) - (rows_C.astype(np.uint64) & np.uint64(0xFFFFFFFF))
    return (bits_C << np.uint64(32)) | before_C


def random_keys(latents_C: NDArray[np.int64], rows_C: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys drawn by latent and row alone (splitmix64): the n largest are a uniform sample of a latent's firings."""
    z_C = rows_C.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + latents_C.astype(np.uint64) * np.uint64(
        0xD1342543DE82EF95
    )
    z_C = (z_C ^ (z_C >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_C = (z_C ^ (z_C >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys_C: NDArray[np.uint64] = (z_C ^ (z_C >> np.uint64(31))) | np.uint64(1)
    return keys_C
