"""Documents packed into contexts of one length, with a mask that says which positions become rows of a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm import text as lm_text
from sparsepilot.lm.text import Document

_TOKENIZED_TOGETHER = 256  # documents per call of the tokenizer, which works on several threads
_NO_DOCUMENT = -1


@dataclass(frozen=True, eq=False)
class Packed:
    """Contexts [C, L], the training ones first. Rows are the masked-in positions, numbered context by context.

    Training rows are `[0, num_train_rows)`, validation rows follow; no document and no context has both.
    """

    tokens_CL: NDArray[np.int32]
    mask_CL: NDArray[np.bool_]
    """True where a position is a row: not the first of its context, no special token, no padding."""
    documents_CL: NDArray[np.int32]
    """Index into `document_ids`; -1 on padding."""
    document_ids: tuple[str, ...]
    num_train_contexts: int

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """[C + 1]: the number of each context's first row; the last entry is the number of rows in all."""
        return np.concatenate([[0], np.cumsum(self.mask_CL.sum(axis=1, dtype=np.int64))])

    @property
    def num_contexts(self) -> int:
        return len(self.tokens_CL)

    @property
    def context_length(self) -> int:
        return int(self.tokens_CL.shape[1])

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])

    @property
    def num_train_rows(self) -> int:
        return int(self.first_rows[self.num_train_contexts])

    @property
    def num_val_rows(self) -> int:
        return self.num_rows - self.num_train_rows

    def of(self, contexts: NDArray[np.int64]) -> Packed:
        """These contexts alone, in this order, all of them for training."""
        return Packed(
            self.tokens_CL[contexts],
            self.mask_CL[contexts],
            self.documents_CL[contexts],
            self.document_ids,
            num_train_contexts=len(contexts),
        )

    @cached_property
    def digest(self) -> str:
        """A hash of tokens, mask, documents and split: equal digests mean the same rows in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.tokens_CL.shape, self.num_train_contexts, self.document_ids)).encode())
        for array in (self.tokens_CL, self.mask_CL, self.documents_CL):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def pack_text(
    tokenizer: Any,
    text: Mapping[str, Any],
    *,
    context_length: int,
    val_fraction: float,
    seed: int,
    max_tokens: int | None,
) -> Packed:
    """`pack` of the documents that `text` (fields of `lm.text.documents`) describes; what is cut short and comes
    shuffled is not read to its end."""
    return pack(
        tokenizer,
        lm_text.documents(**text),
        context_length=context_length,
        val_fraction=val_fraction,
        seed=seed,
        max_tokens=max_tokens,
        shuffle=max_tokens is None or text["source"] not in lm_text.STREAMED,
    )


def pack(
    tokenizer: Any,
    documents: Iterable[Document],
    *,
    context_length: int,
    val_fraction: float = 0.1,
    seed: int = 0,
    max_tokens: int | None = None,
    shuffle: bool = True,
) -> Packed:
    """Tokenizes documents, gives each to training or validation, and lays each side end to end in contexts.

    A context starts with the tokenizer's BOS token, if it has one; its EOS token separates documents; the last context
    of each side is padded. Which side a document falls on, and where in the order, are hashes of (seed, document id):
    the order of arrival does not matter. About `val_fraction` of the *documents* go to validation, one at least.
    `max_tokens` caps the tokens of both sides together (the document at the cap is cut); as the documents are shuffled
    that is a fair sample. `shuffle=False` keeps the order of arrival and reads no further than the cap, for streams
    that come shuffled and are too long to hold.

    Raises ConfigError for a bad size or fraction, DataError where no text, or no row for a side, is left.
    """
    has_bos = tokenizer.bos_token_id is not None
    if context_length < 2 + has_bos:
        raise ConfigError(f"data.build.context_length={context_length}: at least {2 + has_bos} is needed")
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"data.build.val_fraction={val_fraction}: right is from 0 up to, not including, 1")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"data.build.max_tokens={max_tokens}: right is null or at least 1")
    if shuffle:
        documents = sorted(documents, key=lambda document: (_unit(seed, "order", document.id), document.id))
    ids, streams = _tokenize(tokenizer, documents, max_tokens)
    if not ids:
        raise DataError("text: no document gives a token; at least one with text is needed")
    if len(set(ids)) < len(ids):
        twice = next(id for index, id in enumerate(ids) if id in ids[:index])
        raise DataError(f"text: two documents are named {twice!r}; document ids must be unique")
    is_val = _choose_val(ids, val_fraction, seed)
    sides = []
    for side in (False, True):
        members = [index for index in range(len(ids)) if is_val[index] == side]
        sides.append(_lay(tokenizer, [(index, streams[index]) for index in members], context_length))
    special = np.array(sorted(_special_ids(tokenizer)), dtype=np.int64)
    tokens_CL = np.concatenate([side[0] for side in sides])
    documents_CL = np.concatenate([side[1] for side in sides])
    mask_CL = (documents_CL != _NO_DOCUMENT) & ~np.isin(tokens_CL, special)
    mask_CL[:, 0] = False  # a model dumps attention on its first token, whatever it is: its norm is not the others'
    packed = Packed(tokens_CL, mask_CL, documents_CL, tuple(ids), num_train_contexts=len(sides[0][0]))
    if packed.num_train_rows == 0 or (val_fraction > 0 and packed.num_val_rows == 0):
        side_name = "training" if packed.num_train_rows == 0 else "validation"
        raise DataError(
            f"text: {len(ids)} documents leave no row for {side_name}; give more text or data.build.max_tokens"
        )
    return packed


def _tokenize(
    tokenizer: Any, documents: Iterable[Document], max_tokens: int | None
) -> tuple[list[str], list[NDArray[np.int32]]]:
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[str] = []
    streams: list[NDArray[np.int32]] = []
    room = max_tokens
    arriving = iter(documents)
    while (room is None or room > 0) and (some := list(islice(arriving, _TOKENIZED_TOGETHER))):
        texts = [document.text for document in some]
        # `verbose` would warn of texts longer than the model's context, which packing is there for.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, tokens in zip(some, encoded, strict=True):
            if not tokens or room == 0:
                continue
            stream = np.array(tokens + separator, dtype=np.int32)[:room]
            ids.append(document.id)
            streams.append(stream)
            room = None if room is None else room - len(stream)
    return ids, streams


def _choose_val(ids: Sequence[str], val_fraction: float, seed: int) -> list[bool]:
    if val_fraction == 0:
        return [False] * len(ids)
    if len(ids) < 2:
        raise DataError("text: one document cannot be split; give at least two, or data.build.val_fraction=0")
    drawn = [_unit(seed, "val", id) for id in ids]
    # Few documents may all fall on one side: the smallest draw validates and the largest trains in any case.
    first, last = min(drawn), max(drawn)
    return [(draw < val_fraction or draw == first) and draw != last for draw in drawn]


def _lay(
    tokenizer: Any, streams: Sequence[tuple[int, NDArray[np.int32]]], context_length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """One side's documents end to end: tokens [C, L] and document indices [C, L]."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = context_length - len(bos)
    num_tokens = sum(len(stream) for _, stream in streams)
    num_contexts = -(-num_tokens // body)
    tokens = np.full(num_contexts * body, _padding_id(tokenizer), dtype=np.int32)
    documents = np.full(num_contexts * body, _NO_DOCUMENT, dtype=np.int32)
    start = 0
    for index, stream in streams:
        tokens[start : start + len(stream)] = stream
        documents[start : start + len(stream)] = index
        start += len(stream)
    tokens_CL = tokens.reshape(num_contexts, body)
    documents_CL = documents.reshape(num_contexts, body)
    if bos:
        tokens_CL = np.hstack([np.full((num_contexts, 1), bos[0], dtype=np.int32), tokens_CL])
        documents_CL = np.hstack([documents_CL[:, :1], documents_CL])
    return tokens_CL, documents_CL


def _padding_id(tokenizer: Any) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}


def _unit(seed: int, purpose: str, id: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{id}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
