from __future__ import annotations

import pytest
import torch

from sparsepilot.errors import DataError
from sparsepilot.lm.capture import capture, expand_sites, site_widths
from sparsepilot.lm.load import LanguageModel

from .conftest import WIDTH

TOKENS_CL = torch.tensor([[1, 3, 4, 5, 6], [1, 7, 8, 9, 10]])


def test_outputs_and_inputs_are_those_of_the_whole_model(lm: LanguageModel) -> None:
    with torch.no_grad():
        hidden = lm.model(TOKENS_CL, output_hidden_states=True).hidden_states
    sites = [
        "model.layers.2",
        "model.layers.0",
        "model.layers.2:in",
        "model.layers.1.self_attn:in",
        "model.embed_tokens",
    ]
    x = capture(lm, sites, TOKENS_CL)
    assert list(x) == sites
    assert torch.equal(x["model.embed_tokens"], hidden[0].reshape(-1, WIDTH))
    assert torch.equal(x["model.layers.0"], hidden[1].reshape(-1, WIDTH))
    assert torch.equal(x["model.layers.2:in"], hidden[2].reshape(-1, WIDTH))
    assert torch.equal(x["model.layers.2"], hidden[3].reshape(-1, WIDTH))
    with torch.no_grad():  # the attention block is called with keyword arguments and normalised input
        normed = lm.model.model.layers[1].input_layernorm(hidden[1])
    assert torch.equal(x["model.layers.1.self_attn:in"], normed.reshape(-1, WIDTH))


def test_the_pass_stops_after_the_last_site_and_leaves_no_hook(lm: LanguageModel) -> None:
    def count_hooks() -> int:  # transformers keeps some of its own
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())

    before = count_hooks()
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in lm.model.named_modules()
    ]
    try:
        capture(lm, ["model.layers.1.mlp:in"], TOKENS_CL)
    finally:
        for handle in handles:
            handle.remove()
    assert "model.layers.1.post_attention_layernorm" in ran
    assert not {"model.layers.1.mlp.up_proj", "model.layers.2", "lm_head"} & set(ran)
    assert count_hooks() == before


def test_globs_match_one_part_of_the_path_each(lm: LanguageModel) -> None:
    assert expand_sites(lm, ["model.layers.*.mlp:in"]) == [f"model.layers.{i}.mlp:in" for i in range(4)]
    assert expand_sites(lm, ["model.layers.*"]) == [f"model.layers.{i}" for i in range(4)]
    assert expand_sites(lm, ["model.layers.2:out", "model.layers.[12]"]) == ["model.layers.2", "model.layers.1"]


def test_widths_are_seen_not_guessed(lm: LanguageModel) -> None:
    sites = [
        "model.layers.3",
        "model.layers.0.mlp.down_proj:in",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn",
    ]
    assert list(site_widths(lm, sites).values()) == [WIDTH, 48, WIDTH // 2, WIDTH]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("model.layer.3", r"site 'model.layer.3': no such submodule in .*did you mean 'model.layers.3'"),
        ("model.layers.9.mlp:in", r"did you mean 'model.layers"),
        ("model.layers.1:input", r"after the colon stands 'in' or 'out', not 'input'"),
        ("model.rotary_emb", r"one vector per token is needed, found torch.float32 \[1, 3, 8\]"),
        ("model.embed_tokens:in", r"found torch.int64"),
        ("model.layers", r"does not run in a forward pass"),
    ],
)
def test_a_site_that_cannot_be_read_is_one_clear_line(lm: LanguageModel, site: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        site_widths(lm, expand_sites(lm, [site]))
    assert "\n" not in str(caught.value)
