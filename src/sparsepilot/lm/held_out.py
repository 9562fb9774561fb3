"""The contexts that a cache's rows came from, told from the rows' own labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NO_DOCUMENT = -1


@dataclass(frozen=True, eq=False)
class Contexts:
    """Contexts [C, L] of packed text. `pack.Packed` has the same arrays, for both sides of a split."""

    tokens_CL: NDArray[np.int32]
    mask_CL: NDArray[np.bool_]
    """True where a position is a row of the cache."""
    documents_CL: NDArray[np.int32]
    """-1 where there is no row."""
    first_row_C: NDArray[np.int64]
    """Number of each context's first row, counted from the first row given."""

    @property
    def num_contexts(self) -> int:
        return len(self.tokens_CL)

    @property
    def predicted_CL(self) -> NDArray[np.bool_]:
        """[C, L] True where a row predicts the next position's token, which is a row of the same document too.

        What is left out: predictions made at BOS and at separators, which no dictionary reconstructs, and predictions
        of a special token.
        """
        both = self.mask_CL[:, :-1] & self.mask_CL[:, 1:] & (self.documents_CL[:, :-1] == self.documents_CL[:, 1:])
        return np.pad(both, ((0, 0), (0, 1)))


def contexts_of_rows(
    tokenizer: Any,
    context_length: int,
    tokens_N: NDArray[np.int32],
    positions_N: NDArray[np.int32],
    documents_N: NDArray[np.int32],
) -> Contexts:
    """Undoes `pack` for consecutive rows, from the three labels that a cache stores beside each.

    What has no row is known all the same: a context begins with the tokenizer's BOS token, and the one position
    missing between two documents is its EOS token. What follows a context's last row has no say in what is predicted
    before it. A context with any other gap (a special token within a text) is left out, as nobody can tell what stood
    there. Where the tokenizer has no BOS token, the first token of a context is lost with its label: such contexts
    start one position later, and that position is no row.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins_N = np.diff(positions_N, prepend=context_length) <= 0
    context_N = np.cumsum(begins_N) - 1
    num_contexts = int(begins_N.sum())

    before_N = np.where(begins_N, 0, np.concatenate([[0], positions_N[:-1]]))
    missing_N = positions_N - before_N - 1
    between_documents_N = np.diff(documents_N, prepend=documents_N[:1]) != 0
    explained_N = (missing_N == 0) | ((missing_N == 1) & between_documents_N & (eos is not None))
    whole_C = np.ones(num_contexts, dtype=bool)
    whole_C[context_N[~explained_N]] = False

    shape = (num_contexts, context_length)
    tokens_CL = np.full(shape, 0 if eos is None else eos, dtype=np.int32)
    mask_CL = np.zeros(shape, dtype=bool)
    documents_CL = np.full(shape, _NO_DOCUMENT, dtype=np.int32)
    tokens_CL[context_N, positions_N] = tokens_N
    mask_CL[context_N, positions_N] = True
    documents_CL[context_N, positions_N] = documents_N
    if bos is None:
        tokens_CL, mask_CL, documents_CL = tokens_CL[:, 1:], mask_CL[:, 1:], documents_CL[:, 1:]
        mask_CL[:, 0], documents_CL[:, 0] = False, _NO_DOCUMENT
    else:
        tokens_CL[:, 0] = bos
    first_row_C = np.flatnonzero(begins_N)
    return Contexts(tokens_CL[whole_C], mask_CL[whole_C], documents_CL[whole_C], first_row_C[whole_C])
