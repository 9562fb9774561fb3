"""Splicing against the whole model with a hook at the site, for several architectures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsepilot.errors import ConfigError, DataError, NonFiniteError
from sparsepilot.lm.capture import capture
from sparsepilot.lm.held_out import Contexts, contexts_of_rows
from sparsepilot.lm.load import LanguageModel
from sparsepilot.lm.pack import Packed, pack
from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import SplicedCrossEntropy

from .conftest import make_documents

VOCABULARY, WIDTH = 23, 32


def make_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    )  # fmt: skip


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=4, n_head=4, n_positions=64))


def make_gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
                      num_attention_heads=4, max_position_embeddings=64)
    )  # fmt: skip


def make_gemma2() -> Any:
    """Scales its embeddings, caps its logits, sees every other layer through a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
                     max_position_embeddings=64, final_logit_softcapping=3.0)
    )  # fmt: skip


MODELS = {"llama": make_llama, "gpt2": make_gpt2, "gpt_neox": make_gpt_neox, "gemma2": make_gemma2}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "gemma2": "model.layers"}


def make(name: str) -> LanguageModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(6)  # so that it is sure of something, and layers matter
    return LanguageModel(model, None, name, "test", torch.float32)


def make_contexts(num: int = 7, length: int = 12, seed: int = 0) -> Contexts:
    """Random tokens; documents end anywhere, each with a separator that is no row, and positions 0 are none either."""
    make_numbers = np.random.default_rng(seed)
    tokens_CL = make_numbers.integers(3, VOCABULARY, (num, length)).astype(np.int32)
    ends = make_numbers.random((num, length)) < 0.15
    documents_CL = np.cumsum(ends).reshape(num, length).astype(np.int32)
    mask_CL = ~ends
    mask_CL[:, 0] = False
    tokens_CL[ends], tokens_CL[:, 0] = 2, 1
    first_row_C = np.concatenate([[0], np.cumsum(mask_CL.sum(axis=1))[:-1]])
    return Contexts(tokens_CL, mask_CL, np.where(mask_CL, documents_CL, -1).astype(np.int32), first_row_C)


def shrink(x_ND: Tensor) -> Tensor:
    """A reconstruction that is wrong in a way that depends on the row."""
    return 0.7 * x_ND + 0.1 * x_ND.roll(1, dims=1) + 0.05


# ------------------------------------------------------------ the plain way: whole passes, loops, one definition each


def plain_loss(lm: LanguageModel, contexts: Contexts, c: int, hook: Callable[[nn.Module], Any] | None) -> Tensor:
    """[L - 1] losses of one context in a whole pass; `hook` changes a site."""
    tokens_1L = torch.from_numpy(contexts.tokens_CL[c : c + 1].astype(np.int64))
    handle = hook(lm.model) if hook is not None else None
    try:
        logits_LV = lm.model(tokens_1L, use_cache=False).logits[0]
    finally:
        if handle is not None:
            handle.remove()
    return -torch.log_softmax(logits_LV, dim=1)[:-1].gather(1, tokens_1L[0, 1:, None])[:, 0]


def replacing(contexts: Contexts, c: int, site: str, change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], Any]:
    """A hook that puts change(x) in the place of the site's rows."""
    path, _, side = site.partition(":")
    mask_L = torch.from_numpy(contexts.mask_CL[c])

    def changed(x_1LD: Tensor) -> Tensor:
        return torch.where(mask_L[None, :, None], change(x_1LD[0])[None], x_1LD)

    def after(_: Any, __: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    def register(model: nn.Module) -> Any:
        module = model.get_submodule(path)
        if side == "in":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    return register


def plain_ce(
    lm: LanguageModel, contexts: Contexts, site: str | None = None, change: Callable[[Tensor], Tensor] | None = None
) -> float:
    total, num = 0.0, 0
    for c in range(contexts.num_contexts):
        hook = None if site is None or change is None else replacing(contexts, c, site, change)
        losses = plain_loss(lm, contexts, c, hook).tolist()
        mask, documents = contexts.mask_CL[c], contexts.documents_CL[c]
        for p, loss in enumerate(losses):
            if mask[p] and mask[p + 1] and documents[p] == documents[p + 1]:
                total, num = total + loss, num + 1
    return total / num


def all_of(lm: LanguageModel, contexts: Contexts, read: str, write: str | None = None, **options: Any) -> Any:
    seam = Seam(lm, read, write or read)
    tokens = int(contexts.predicted_CL.sum())
    mean_D = torch.linspace(-1, 1, seam.width)
    return SplicedCrossEntropy(seam, contexts, mean_D, **{"tokens": tokens, "batch_contexts": 3, **options})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", ["{}.2", "{}.0", "{}.3", "{}.2:in", "{}.1.mlp", "{}.1.mlp:in", "attention"])
def test_a_pass_from_the_site_on_is_a_whole_pass_with_a_hook(name: str, site: str) -> None:
    if site == "attention":
        site = "{}.2." + {"llama": "self_attn", "gpt2": "attn", "gpt_neox": "attention", "gemma2": "self_attn"}[name]
    site = site.format(LAYERS[name])
    lm, contexts = make(name), make_contexts()
    ce = all_of(lm, contexts, site)
    assert ce.seam.restarts
    assert ce.seam.head_apart
    mean_D = torch.linspace(-1, 1, WIDTH)
    found = ce.measure(shrink)
    assert found["ce"] == pytest.approx(plain_ce(lm, contexts, site, shrink), rel=1e-5)
    assert found["ce_clean"] == pytest.approx(plain_ce(lm, contexts), rel=1e-5)
    assert found["ce_zero"] == pytest.approx(plain_ce(lm, contexts, site, torch.zeros_like), rel=1e-5)
    assert found["ce_mean"] == pytest.approx(plain_ce(lm, contexts, site, mean_D.expand_as), rel=1e-5)
    assert abs(found["ce"] - found["ce_clean"]) > 1e-3  # the site matters, or this test would prove nothing
    gap = found["ce_zero"] - found["ce_clean"]
    if gap > 0:
        assert found["ce_recovered"] == pytest.approx((found["ce_zero"] - found["ce"]) / gap)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["{}.2", "{}.1.mlp", "{}.1.mlp:in"])
def test_identity_changes_no_bit_and_zeros_are_the_ablation(name: str, site: str) -> None:
    ce = all_of(make(name), make_contexts(), site.format(LAYERS[name]))
    same = ce.measure(lambda x_ND: x_ND, last=True)
    assert same["ce"] == same["ce_clean"]
    assert same["ce_se"] == 0.0
    assert same["kl"] == 0.0
    assert ce.measure(torch.zeros_like)["ce"] == same["ce_zero"]
    assert ce.measure(lambda x_ND: ce._mean_D.expand_as(x_ND))["ce"] == same["ce_mean"]


def test_clean_is_the_loss_that_the_model_gives_itself() -> None:
    lm, contexts = make("llama"), make_contexts()
    tokens_CL = torch.from_numpy(contexts.tokens_CL.astype(np.int64))
    labels_CL = torch.full_like(tokens_CL, -100)
    predicted_CL = torch.from_numpy(contexts.predicted_CL)
    labels_CL[:, 1:][predicted_CL[:, :-1]] = tokens_CL[:, 1:][predicted_CL[:, :-1]]
    own = float(lm.model(input_ids=tokens_CL, labels=labels_CL, use_cache=False).loss)
    assert all_of(lm, contexts, "model.layers.1").measure(shrink)["ce_clean"] == pytest.approx(own, rel=1e-5)


def test_a_transcoder_reads_the_clean_pass_and_writes_further_up() -> None:
    lm, contexts = make("llama"), make_contexts()
    read, write = "model.layers.1.mlp:in", "model.layers.2.mlp"
    found = all_of(lm, contexts, read, write).measure(shrink)["ce"]
    clean: dict[int, Tensor] = {
        c: capture(lm, [read], torch.from_numpy(contexts.tokens_CL[c : c + 1].astype(np.int64)))[read] for c in range(7)
    }
    total, num = 0.0, 0
    for c, x_LD in clean.items():
        losses_P = plain_loss(lm, contexts, c, replacing(contexts, c, write, lambda _, x_LD=x_LD: shrink(x_LD)))
        predicted_P = torch.from_numpy(contexts.predicted_CL[c, :-1])
        total, num = total + float(losses_P[predicted_P].sum()), num + int(predicted_P.sum())
    assert found == pytest.approx(total / num, rel=1e-5)
    with pytest.raises(ConfigError, match=r"computes model.layers.2.mlp after model.layers.1.mlp:in"):
        Seam(lm, write, read)


@pytest.mark.parametrize("site", ["model.embed_tokens", "model.norm", "lm_head:in"])
def test_a_site_outside_the_blocks_takes_whole_passes(site: str) -> None:
    lm, contexts = make("llama"), make_contexts()
    ce = all_of(lm, contexts, site)
    assert not ce.seam.restarts
    assert ce.seam.head_apart == (site != "lm_head:in")
    plain_site = "model.norm" if site == "lm_head:in" else site
    assert ce.measure(shrink)["ce"] == pytest.approx(plain_ce(lm, contexts, plain_site, shrink), rel=1e-5)


def test_a_model_whose_layers_look_further_down_takes_whole_passes() -> None:
    """The last block adds what the first one saw: a pass that starts between them would be another model."""
    lm, contexts = make("llama"), make_contexts()
    layers = lm.model.model.layers
    seen: list[Tensor] = []
    layers[0].mlp.register_forward_hook(lambda _, args, output: seen.append(output))
    layers[3].register_forward_pre_hook(lambda _, args: (args[0] + seen[-1][: len(args[0])], *args[1:]))
    seen.append(torch.zeros(8, 12, WIDTH))
    ce = all_of(lm, contexts, "model.layers.2", batch_contexts=1)
    assert not ce.seam.restarts
    assert ce.seam.head_apart
    assert ce.measure(shrink)["ce"] == pytest.approx(plain_ce(lm, contexts, "model.layers.2", shrink), rel=1e-5)


def test_kl_is_that_of_whole_distributions() -> None:
    lm, contexts, site = make("gpt2"), make_contexts(), "transformer.h.2"
    found = all_of(lm, contexts, site).measure(shrink, last=True)["kl"]
    total, num = 0.0, 0
    for c in range(7):
        tokens_1L = torch.from_numpy(contexts.tokens_CL[c : c + 1].astype(np.int64))
        p_LV = lm.model(tokens_1L).logits[0].double().softmax(1)
        handle = replacing(contexts, c, site, shrink)(lm.model)
        q_LV = lm.model(tokens_1L).logits[0].double().softmax(1)
        handle.remove()
        kl_L = (p_LV * (p_LV / q_LV).log()).sum(1)[torch.from_numpy(contexts.predicted_CL[c])]
        total, num = total + float(kl_L.sum()), num + len(kl_L)
    assert found == pytest.approx(total / num, rel=1e-4)


def test_a_pass_leaves_no_trace() -> None:
    lm = make("llama")
    ce = all_of(lm, make_contexts(), "model.layers.1.mlp")
    before = {name: set(module.__dict__) for name, module in lm.model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
    random = torch.random.get_rng_state()
    first = ce.measure(shrink, last=True)
    assert ce.measure(shrink, last=True) == first  # equal bits, and nothing that is kept was changed
    assert {name: set(module.__dict__) for name, module in lm.model.named_modules()} == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()) == hooks
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_set_is_spread_and_a_smaller_one_stands_on_its_scale() -> None:
    contexts = make_contexts(num=40)
    whole = int(contexts.predicted_CL.sum())
    lm = make("llama")
    ce = all_of(lm, contexts, "model.layers.1", tokens=whole // 2, often_tokens=whole // 8, batch_contexts=2)
    assert whole // 2 <= ce.num_tokens <= whole // 2 + 24
    assert whole // 8 <= ce.num_often_tokens < whole // 4
    chosen = np.sort(np.concatenate([np.unique(batch.contexts_S) for batch in ce.batches]))
    assert np.diff(chosen).max() <= 3  # about every second one, from end to end
    assert chosen[0] <= 1
    assert chosen[-1] >= 37
    full, often = ce.measure(shrink), ce.measure(shrink, often=True)
    assert {k: often[k] for k in ("ce_clean", "ce_zero")} == {k: full[k] for k in ("ce_clean", "ce_zero")}
    assert "kl" not in often
    assert often["ce_se"] > 0
    assert abs(often["ce"] - full["ce"]) < 4 * often["ce_se"]
    assert ce.measure(lambda x_ND: x_ND, often=True)["ce"] == full["ce_clean"]
    with pytest.raises(ConfigError, match=rf"cross_entropy.tokens = 9999: .* make {whole} predictions in 40 contexts"):
        all_of(lm, contexts, "model.layers.1", tokens=9999)


def test_what_a_small_set_is_biased_by_is_taken_off() -> None:
    contexts = make_contexts(num=40)
    lm = make("llama")

    ce = all_of(lm, contexts, "model.layers.1", tokens=200, often_tokens=50, batch_contexts=2)
    full = ce.measure(lambda x_ND: 0.0 * x_ND)
    correction = full["correction"]
    assert correction != pytest.approx(1.0, abs=0.01)
    same = ce.measure(lambda x_ND: 0.0 * x_ND, often=True, correction=correction)
    assert same["ce"] == pytest.approx(full["ce"], rel=1e-9)
    plain, corrected = (
        ce.measure(lambda x_ND: 0.1 * x_ND, often=True, correction=by)["ce"] - full["ce_clean"]
        for by in (1.0, correction)
    )
    assert corrected == pytest.approx(correction * plain, rel=1e-9)


def test_a_reconstruction_that_is_nan_is_said() -> None:
    ce = all_of(make("llama"), make_contexts(), "model.layers.1")
    with pytest.raises(NonFiniteError, match="val/ce is nan"):
        ce.measure(lambda x_ND: x_ND * math.nan)


def test_a_site_that_the_model_lacks_is_one_line() -> None:
    with pytest.raises(DataError, match=r"no such submodule in llama; did you mean 'model.layers.3'"):
        Seam(make("llama"), "model.layer.3", "model.layer.3")


# ------------------------------------------------------------ contexts from rows


class Tokenizer:
    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos


def rows_of(packed: Packed, side: slice) -> tuple[Any, Any, Any]:
    """The three labels of each row of some contexts, as the harvest writes them."""
    mask_CL = packed.mask_CL[side]
    positions_CL = np.broadcast_to(np.arange(packed.context_length, dtype=np.int32), mask_CL.shape)
    return packed.tokens_CL[side][mask_CL], positions_CL[mask_CL], packed.documents_CL[side][mask_CL]


@given(st.integers(5, 60), st.integers(4, 30), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_rows_give_back_the_contexts_that_were_packed(
    lm: LanguageModel, num_documents: int, context_length: int, seed: int
) -> None:
    documents = make_documents(num_documents)
    packed = pack(lm.tokenizer, documents, context_length=context_length, val_fraction=0.3, seed=seed)
    side = slice(packed.num_train_contexts, None)
    found = contexts_of_rows(lm.tokenizer, context_length, *rows_of(packed, side))
    with_rows_C = packed.mask_CL[side].any(axis=1)
    expected_CL, mask_CL = packed.tokens_CL[side][with_rows_C], packed.mask_CL[side][with_rows_C]
    assert np.array_equal(found.mask_CL, mask_CL)
    last_C = mask_CL.shape[1] - 1 - mask_CL[:, ::-1].argmax(axis=1)
    for c, last in enumerate(last_C):  # past its last row a context may differ: padding
        assert np.array_equal(found.tokens_CL[c, : last + 1], expected_CL[c, : last + 1])
    assert np.array_equal(found.first_row_C, np.cumsum(mask_CL.sum(axis=1)) - mask_CL.sum(axis=1))
    assert np.array_equal(found.predicted_CL, make_predicted(packed, side)[with_rows_C])


def make_predicted(packed: Packed, side: slice) -> Any:
    mask_CL = packed.mask_CL[side]
    out_CL = np.zeros_like(mask_CL)
    out_CL[:, :-1] = mask_CL[:, :-1] & mask_CL[:, 1:]  # with separators, neighbours that are rows share a document
    return out_CL


def test_a_context_with_a_gap_that_no_separator_explains_is_left_out() -> None:
    # contexts of 6: [B 5 6 E 7 8], [B 5 ? 6 7 8] with a special token inside a text, [B E 7 8 9 9] after a separator
    tokens, positions = [5, 6, 7, 8, 5, 6, 7, 8, 7, 8, 9, 9], [1, 2, 4, 5, 1, 3, 4, 5, 2, 3, 4, 5]
    documents = [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    rows = [np.array(label, dtype=np.int32) for label in (tokens, positions, documents)]
    found = contexts_of_rows(Tokenizer(), 6, *rows)
    assert found.tokens_CL.tolist() == [[1, 5, 6, 2, 7, 8], [1, 2, 7, 8, 9, 9]]
    assert found.first_row_C.tolist() == [0, 8]
    assert found.predicted_CL.astype(int).tolist() == [[0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0]]
    without_bos = contexts_of_rows(Tokenizer(bos=None), 6, *rows)
    assert without_bos.tokens_CL.tolist() == [[5, 6, 2, 7, 8], [2, 7, 8, 9, 9]]
    assert without_bos.mask_CL.astype(int).tolist() == [[0, 1, 0, 1, 1], [0, 1, 1, 1, 1]]
    # without separators documents adjoin, and nothing is missing between them
    adjoining = contexts_of_rows(Tokenizer(eos=None), 4, *(np.array(x) for x in ([5, 6, 7], [1, 2, 3], [0, 0, 1])))
    assert adjoining.tokens_CL.tolist() == [[1, 5, 6, 7]]
    assert adjoining.predicted_CL.astype(int).tolist() == [[0, 1, 0, 0]]
