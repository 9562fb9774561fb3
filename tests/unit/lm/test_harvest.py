from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm.harvest import Block, describe, harvest
from sparsepilot.lm.load import LanguageModel, load
from sparsepilot.lm.pack import Packed, pack
from sparsepilot.lm.text import describe as describe_text
from sparsepilot.lm.text import documents

from .conftest import SMOLLM2, WIDTH
from .test_load import needs_smollm2

SITES = ["model.layers.1", "model.layers.2.mlp:in"]


def whole(blocks: list[Block]) -> Block:
    return Block(
        rows=range(blocks[0].rows.start, blocks[-1].rows.stop),
        x={site: torch.cat([b.x[site] for b in blocks]) for site in blocks[0].x},
        tokens=np.concatenate([b.tokens for b in blocks]),
        positions=np.concatenate([b.positions for b in blocks]),
        documents=np.concatenate([b.documents for b in blocks]),
    )


def test_rows_are_those_of_a_plain_forward_pass(lm: LanguageModel, packed: Packed) -> None:
    seen: list[int] = []
    block = whole(list(harvest(lm, packed, SITES, batch_contexts=4, dtype="float32", progress=seen.append)))
    tokens_CL = torch.from_numpy(packed.tokens_CL.astype(np.int64))
    with torch.no_grad():
        hidden = lm.model(tokens_CL, output_hidden_states=True).hidden_states[2]
    mask_CL = torch.from_numpy(packed.mask_CL)
    torch.testing.assert_close(block.x["model.layers.1"], hidden[mask_CL], rtol=1e-4, atol=1e-6)
    assert block.rows == range(packed.num_rows)
    assert seen[-1] == packed.num_rows
    assert block.x["model.layers.2.mlp:in"].shape == (packed.num_rows, WIDTH)
    assert np.array_equal(block.tokens, packed.tokens_CL[packed.mask_CL])
    assert np.array_equal(block.documents, packed.documents_CL[packed.mask_CL])
    assert np.array_equal(block.positions, np.nonzero(packed.mask_CL)[1])
    assert block.positions.min() == 1


BATCHES = (3, 8)


@pytest.fixture(scope="session")
def all_rows_by_batch(lm: LanguageModel, packed: Packed) -> dict[int, Block]:
    return {b: whole(list(harvest(lm, packed, SITES, batch_contexts=b, dtype="float32"))) for b in BATCHES}


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_every_range(
    lm: LanguageModel, packed: Packed, all_rows_by_batch: dict[int, Block], data: st.DataObject
) -> None:
    batch_contexts = data.draw(st.sampled_from(BATCHES))
    start = data.draw(st.integers(0, packed.num_rows - 1))
    stop = data.draw(st.integers(start + 1, packed.num_rows))
    all_rows = all_rows_by_batch[batch_contexts]
    some = whole(list(harvest(lm, packed, SITES, range(start, stop), batch_contexts=batch_contexts, dtype="float32")))
    assert some.rows == range(start, stop)
    for site in SITES:
        assert torch.equal(some.x[site], all_rows.x[site][start:stop])
    assert np.array_equal(some.tokens, all_rows.tokens[start:stop])
    assert np.array_equal(some.positions, all_rows.positions[start:stop])
    assert np.array_equal(some.documents, all_rows.documents[start:stop])


def test_an_empty_range_gives_nothing_and_dtypes_are_those_asked_for(lm: LanguageModel, packed: Packed) -> None:
    assert list(harvest(lm, packed, SITES, range(5, 5))) == []
    for name in ("float16", "bfloat16", "float32"):
        block = next(harvest(lm, packed, SITES, dtype=name))
        assert {x.dtype for x in block.x.values()} == {getattr(torch, name)}
        assert not any(x.is_inference() or x.requires_grad for x in block.x.values())


def test_values_that_do_not_fit_are_refused_by_name(lm: LanguageModel, packed: Packed) -> None:
    def scaled(by: float) -> torch.utils.hooks.RemovableHandle:
        return lm.model.model.layers[1].register_forward_hook(lambda _, __, out: out * by)

    handle = scaled(1e7)
    try:
        with pytest.raises(DataError, match=r"'model.layers.1': row \d+ holds .*float16 ends at 6.55e\+04; .*bfloat16"):
            list(harvest(lm, packed, ["model.layers.1"], dtype="float16"))
        assert list(harvest(lm, packed, ["model.layers.1"], dtype="bfloat16"))
    finally:
        handle.remove()
    handle = scaled(float("nan"))
    try:
        with pytest.raises(DataError, match=r"site 'model.layers.1': row 20 is NaN or infinite"):
            list(harvest(lm, packed, ["model.layers.1"], range(20, 30), dtype="bfloat16"))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype='int8': right are 'float16', 'bfloat16', 'float32'"),
        ({"batch_contexts": 0}, r"batch_contexts=0"),
        ({"rows": range(10**9)}, r"rows=range\(0, 1000000000\): right is a range"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_block(
    lm: LanguageModel, packed: Packed, options: dict[str, object], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        harvest(lm, packed, SITES, **options)


def test_a_context_longer_than_the_model_is_refused(lm: LanguageModel, packed: Packed) -> None:
    long = replace(packed, tokens_CL=np.tile(packed.tokens_CL, (1, 5)), mask_CL=np.tile(packed.mask_CL, (1, 5)))
    with pytest.raises(ConfigError, match=r"context_length=80: .* takes at most 64"):
        harvest(lm, long, SITES)


def test_the_description_is_json_and_names_what_the_rows_depend_on(lm: LanguageModel, packed: Packed) -> None:
    text = describe_text("python_docs")
    facts = describe(lm, packed, text)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["model_revision"].startswith("sha256:")
    assert facts["model_dtype"] == "float32"
    assert facts["context_length"] == 16
    assert facts["text"]["python"]


@needs_smollm2
@pytest.mark.lm
@pytest.mark.slow  # loads a language model of 135M parameters: 15 s the first time
def test_smollm2_rows_do_not_depend_on_the_range(smollm2_unpacked: dict[str, Any]) -> None:
    lm = load(**SMOLLM2)
    packed = pack(lm.tokenizer, documents("python_docs"), context_length=128, max_tokens=6000)
    site = "model.layers.9"
    all_rows = whole(list(harvest(lm, packed, [site])))
    some = whole(list(harvest(lm, packed, [site], range(1500, 2500))))
    assert torch.equal(some.x[site], all_rows.x[site][1500:2500])
    norms_N = all_rows.x[site].float().norm(dim=1)
    # Position 0 would have a norm hundreds of times the others'.
    assert norms_N.max() < 20 * norms_N.median()
