from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm.load import LanguageModel
from sparsepilot.lm.pack import Packed, pack
from sparsepilot.lm.text import Document

from .conftest import WORDS, make_documents

UNK, BOS, EOS = 0, 1, 2


def rows_of(packed: Packed, start: int, stop: int) -> dict[str, list[int]]:
    """Document -> its row tokens in order, over the contexts [start, stop)."""
    found: dict[str, list[int]] = {}
    for c in range(start, stop):
        for token, document in zip(
            packed.tokens_CL[c][packed.mask_CL[c]], packed.documents_CL[c][packed.mask_CL[c]], strict=True
        ):
            found.setdefault(packed.document_ids[document], []).append(int(token))
    return found


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=2, max_size=30),
    context_length=st.integers(3, 20),
    val_fraction=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 5),
)
def test_every_token_is_a_row_once_and_no_document_is_on_both_sides(
    lm: LanguageModel, lengths: list[int], context_length: int, val_fraction: float, seed: int
) -> None:
    documents = [
        Document(f"d{i}", " ".join(WORDS[(i + j) % len(WORDS)] for j in range(n))) for i, n in enumerate(lengths)
    ]
    if sum(n > 0 for n in lengths) < 2:
        return
    packed = pack(lm.tokenizer, documents, context_length=context_length, val_fraction=val_fraction, seed=seed)
    train = rows_of(packed, 0, packed.num_train_contexts)
    val = rows_of(packed, packed.num_train_contexts, packed.num_contexts)
    assert not set(train) & set(val)
    assert bool(val) == (val_fraction > 0)
    wanted = {d.id: lm.tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in documents if d.text}
    assert train | val == wanted
    assert sum(map(len, train.values())) == packed.num_train_rows
    assert sum(map(len, val.values())) == packed.num_val_rows
    assert (packed.tokens_CL[:, 0] == BOS).all()
    assert not packed.mask_CL[:, 0].any()
    assert not np.isin(packed.tokens_CL[packed.mask_CL], [BOS, EOS]).any()
    assert not packed.mask_CL[packed.documents_CL < 0].any()
    assert (packed.tokens_CL == EOS).sum() >= len(wanted)
    assert packed.tokens_CL.dtype == packed.documents_CL.dtype == np.int32


def test_order_of_arrival_does_not_matter_and_the_seed_does(lm: LanguageModel) -> None:
    documents = make_documents(30)
    packed = pack(lm.tokenizer, documents, context_length=16)
    assert pack(lm.tokenizer, reversed(documents), context_length=16).digest == packed.digest
    assert pack(lm.tokenizer, documents, context_length=16, seed=1).digest != packed.digest
    assert packed.document_ids != tuple(d.id for d in documents)


def test_a_cap_on_tokens_takes_a_prefix_of_the_shuffled_documents(lm: LanguageModel) -> None:
    documents = make_documents(40)
    whole = pack(lm.tokenizer, documents, context_length=16, val_fraction=0.25)
    capped = pack(lm.tokenizer, documents, context_length=16, val_fraction=0.25, max_tokens=200)
    assert capped.document_ids == whole.document_ids[: len(capped.document_ids)]
    in_context = capped.documents_CL[:, 1:]
    assert (in_context >= 0).sum() == 200
    sides = [
        {p.document_ids[d] for d in np.unique(p.documents_CL[: p.num_train_contexts]) if d >= 0}
        for p in (whole, capped)
    ]
    assert sides[1] == sides[0] & set(capped.document_ids)  # a document does not change sides with the cap


def test_a_stream_is_read_no_further_than_the_cap(lm: LanguageModel) -> None:
    def endless():
        for i in range(100_000):
            assert i < 1000
            yield Document(f"d{i}", "a b c d e f g h")

    packed = pack(lm.tokenizer, endless(), context_length=16, max_tokens=300, shuffle=False)
    assert packed.document_ids[:3] == ("d0", "d1", "d2")


def test_special_tokens_in_the_text_and_tokenizers_without_them(lm: LanguageModel) -> None:
    import copy

    packed = pack(lm.tokenizer, [Document("x", "a <s> b </s> zzz c")], context_length=16, val_fraction=0)
    assert packed.tokens_CL[0, :7].tolist() == [BOS, 3, BOS, 4, EOS, UNK, 5]
    assert packed.mask_CL[0, :8].tolist() == [False, True, False, True, False, False, True, False]
    bare = copy.deepcopy(lm.tokenizer)
    bare.bos_token = bare.eos_token = None
    packed = pack(bare, [Document("x", "a b c"), Document("y", "d e")], context_length=4, val_fraction=0)
    assert packed.mask_CL.tolist() == [[False, True, True, True], [False, False, False, False]]


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([Document("x", "")], {}, "no document gives a token"),
        ([Document("x", "a b")], {}, "one document cannot be split"),
        ([Document("x", "a b")] * 2, {}, "two documents are named 'x'"),
        ([Document("x", "<s> </s>")], {"val_fraction": 0}, "leave no row for training"),
        (make_documents(4), {"context_length": 2}, "context_length=2: at least 3"),
        (make_documents(4), {"val_fraction": 1.0}, "val_fraction=1.0"),
        (make_documents(4), {"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_bad_input_is_one_clear_line(
    lm: LanguageModel, documents: list[Document], options: dict[str, float], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        pack(lm.tokenizer, documents, **{"context_length": 16, **options})
