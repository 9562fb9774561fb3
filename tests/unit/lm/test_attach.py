"""`sparsepilot.attach` against a plain hook that says the formula, in forward passes and under generate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsepilot
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.interop.dictionary import Dictionary, build

from .test_splice import VOCABULARY, WIDTH, make

BOS = 1
F = 40
EDITS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ablate": {"ablate": [3, 17]},
    "scale": {"scale": {3: -2.5, 5: 0.5}},
    "clamp": {"clamp": {8: 4.0}},
    "all": {"ablate": [3], "scale": {5: 3.0}, "clamp": {8: 4.0, 9: 0.0}},
}


def dictionary(architecture: str = "topk", d_out: int = WIDTH, skip: bool = False, blocks: str = "autoencoder") -> Any:
    make_ = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (WIDTH, F), "b_enc": (F,), "W_dec": (F, d_out), "b_dec": (d_out,)}
    shapes |= {"threshold": (F,)} if architecture == "jumprelu" else {}
    shapes |= {"W_skip": (d_out, WIDTH)} if skip else {}
    tensors = {name: 0.5 * torch.randn(shape, generator=make_) for name, shape in shapes.items()}
    cfg = {"architecture": architecture, "blocks": blocks, "d_in": WIDTH, "d_sae": F, "d_out": d_out, "skip": skip}
    cfg |= {"k": 12, "sites": ["model.layers.1"], "sites_out": ["model.layers.1"]}
    return build(cfg, tensors, Path("x/sae.json"))


def tokens(num: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    tokens_CL = torch.randint(3, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(seed))
    tokens_CL[:, 0] = BOS
    return tokens_CL


def plain(sae: Dictionary, keep_error: bool, edits: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The formula, dense and latent by latent: what takes the place of y, given what the dictionary reads."""

    def change(x: Tensor, y: Tensor) -> Tensor:
        codes = sae.encode(x)
        edited = codes.clone()
        for latent in edits.get("ablate", []):
            edited[..., latent] = 0
        for latent, factor in edits.get("scale", {}).items():
            edited[..., latent] = factor * codes[..., latent]
        for latent, value in edits.get("clamp", {}).items():
            edited[..., latent] = value
        made = sae.decode(edited) + (x @ sae.W_skip.T if sae.cfg["skip"] else 0)
        return made + (y - sae(x)) if keep_error else made

    return change


def with_hook(model: Any, site: str, tokens_CL: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Logits of a whole pass with change(x, x) in place of the site's x, but at BOS."""
    path, _, side = site.partition(":")
    keep = (tokens_CL == BOS)[..., None]

    def changed(x: Tensor) -> Tensor:
        return torch.where(keep, x, change(x, x))

    def after(_: Any, __: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def before(_: Any, args: Any) -> Any:
        return (changed(args[0]), *args[1:])

    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(before) if side else module.register_forward_hook(after)
    logits: Tensor = model(tokens_CL, use_cache=False).logits
    handle.remove()
    return logits


@torch.no_grad()
@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("llama", "model.layers.1"),
        ("llama", "model.layers.2.mlp:in"),
        ("gpt2", "transformer.h.1"),
        ("gpt2", "transformer.h.2.attn"),
    ],
)
def test_it_is_the_formula(name: str, site: str, edits: str, keep_error: bool) -> None:
    model, sae = make(name).model, dictionary("jumprelu")
    model.config.bos_token_id, model.config.eos_token_id = BOS, None
    clean = model(tokens(), use_cache=False).logits
    with sparsepilot.attach(model, sae, site, keep_error=keep_error, **EDITS[edits]):
        found = model(tokens(), use_cache=False).logits
    expected = with_hook(model, site, tokens(), plain(sae, keep_error, EDITS[edits]))
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
    changes = bool(EDITS[edits]) or not keep_error
    assert torch.allclose(found, clean) is not changes
    assert torch.equal(found[:, 0], clean[:, 0])  # BOS is left alone
    assert torch.equal(model(tokens(), use_cache=False).logits, clean)


@torch.no_grad()
def test_an_edit_of_nothing_keeps_every_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, sae = make("llama").model.to(dtype), dictionary()
        clean = model(tokens(), use_cache=False).logits
        silent = next(f for f in range(F) if not sae_activity(model, sae)[f])
        for edits in ({}, {"scale": {3: 1.0, 4: 1}}, {"ablate": [silent]}, {"clamp": {silent: 0.0}}):
            with sparsepilot.attach(model, sae, "model.layers.1", keep_error=True, **edits):
                assert torch.equal(model(tokens(), use_cache=False).logits, clean)


def sae_activity(model: Any, sae: Dictionary) -> list[bool]:
    """Whether each latent is active anywhere; the last is made so that it never is."""
    sae.b_enc.data[-1] = -1e6
    seen: list[Tensor] = []
    handle = model.get_submodule("model.layers.1").register_forward_hook(lambda _, __, out: seen.append(out))
    model(tokens(), use_cache=False)
    handle.remove()
    return (sae.encode(seen[0].float()) != 0).flatten(0, -2).any(0).tolist()


@torch.no_grad()
@pytest.mark.parametrize("keep_error", [False, True])
def test_generated_text_is_that_of_whole_passes(keep_error: bool) -> None:
    """With a cache of keys, a pass has one position; without, all; beside a loop of whole passes with a plain hook."""
    model, sae = make("llama").model, dictionary()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    start, edits, site = tokens(2, 5), {"clamp": {8: 6.0}, "ablate": [3]}, "model.layers.1"
    options = {"max_new_tokens": 12, "do_sample": False}
    clean = model.generate(start, **options)
    with sparsepilot.attach(model, sae, keep_error=keep_error, **edits):
        cached = model.generate(start, use_cache=True, **options)
        whole = model.generate(start, use_cache=False, **options)
    expected = start
    for _ in range(12):
        logits = with_hook(model, site, expected, plain(sae, keep_error, edits))
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, expected)
    assert torch.equal(whole, expected)
    assert not torch.equal(cached, clean)
    assert torch.equal(model.generate(start, **options), clean)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def test_several_at_once_and_an_exception() -> None:
    model, sae, other = make("llama").model, dictionary(), dictionary("jumprelu")
    clean = model(tokens(), use_cache=False).logits
    first, second = {"clamp": {8: 4.0}}, {"ablate": [3], "scale": {5: 2.0}}

    def both_and_break() -> None:
        with sparsepilot.attach(model, other, "model.layers.1", skip_tokens=[], **second):
            found.append(model(tokens(), use_cache=False).logits)
            raise ZeroDivisionError

    found: list[Tensor] = []
    with sparsepilot.attach(model, sae, "model.layers.1", skip_tokens=[], **first):
        one = model(tokens(), use_cache=False).logits
        with pytest.raises(ZeroDivisionError):
            both_and_break()
        assert torch.equal(model(tokens(), use_cache=False).logits, one)
    assert hooks(model) == 0
    assert torch.equal(model(tokens(), use_cache=False).logits, clean)
    done, then = plain(sae, False, first), plain(other, False, second)
    handle = model.get_submodule("model.layers.1").register_forward_hook(lambda _, __, x: then(done(x, x), done(x, x)))
    expected = model(tokens(), use_cache=False).logits
    handle.remove()
    assert torch.allclose(found[0], expected, atol=2e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("keep_error", [False, True])
def test_a_transcoder_reads_one_site_and_acts_at_another(keep_error: bool) -> None:
    model, sae = make("llama").model, dictionary("relu", skip=True, blocks="transcoder")
    site = ("model.layers.1.mlp:in", "model.layers.1.mlp")
    change = plain(sae, keep_error, EDITS["all"])
    handle = model.get_submodule(site[1]).register_forward_hook(lambda _, args, y: change(args[0], y))
    expected = model(tokens(), use_cache=False).logits
    handle.remove()
    with sparsepilot.attach(model, sae, site, keep_error=keep_error, skip_tokens=(), **EDITS["all"]):
        found = model(tokens(), use_cache=False).logits
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "site", "message"),
    [
        ({}, "model.layers.9", "site 'model.layers.9': no such submodule in LlamaForCausalLM; did you mean"),
        ({}, "model.layers.1:inn", "after the colon stands 'in' or 'out'"),
        ({}, "lm_head", "attach: site = 'lm_head': is 23 wide in LlamaForCausalLM, the dictionary reads 32"),
        ({}, ("model.layers.2", "model.layers.1"), "computes model.layers.2 after model.layers.1"),
        ({"ablate": [F]}, None, "attach: ablate: there is no latent 40; the dictionary has 0 to 39"),
        ({"scale": {-1: 2.0}}, None, "attach: scale: there is no latent -1"),
        ({"ablate": 3}, None, "attach: ablate = 3: a list of latents is needed"),
        ({"ablate": [True]}, None, "attach: ablate: there is no latent True"),
        ({"ablate": torch.tensor([1.5])}, None, "attach: ablate: there is no latent tensor(1.5000)"),
        ({"scale": [2]}, None, "attach: scale = [2]: a number for each latent is needed"),
        ({"clamp": {1: "x"}}, None, "attach: clamp: latent 1 has 'x'; a finite number is needed"),
        ({"clamp": {2: float("inf")}}, None, "attach: clamp: latent 2 has inf"),
        ({"ablate": [2], "clamp": {2: 1.0}}, None, "attach: clamp: latent 2 is edited twice"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_the_model_alone(options: Any, site: Any, message: str) -> None:
    model = make("llama").model
    with pytest.raises((ConfigError, DataError)) as caught:
        sparsepilot.attach(model, dictionary(), site, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hooks(model) == 0


@torch.no_grad()
def test_integers_of_numpy_and_torch_name_latents() -> None:
    model, sae = make("llama").model, dictionary()
    logits = []
    for ids in ([3, 5], np.array([3, 5]), torch.tensor([3, 5, 3])):
        clamp = {np.int64(7): np.float32(30)} if isinstance(ids, np.ndarray) else {7: 30.0}
        with sparsepilot.attach(model, sae, ablate=ids, clamp=clamp):
            logits.append(model(tokens(), use_cache=False).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with pytest.raises(ConfigError, match="latent 3 is edited twice"):
        sparsepilot.attach(model, sae, ablate=torch.tensor([3]), clamp={np.int64(3): 1.0})


def test_several_sites_have_no_one_place() -> None:
    sae = dictionary()
    sae.cfg["sites"] = ["model.layers.1", "model.layers.2"]
    with pytest.raises(ConfigError, match="attach: site = None: the dictionary reads"):
        sparsepilot.attach(make("llama").model, sae)
    sae.cfg["blocks"] = "transcoder"
    with pytest.raises(ConfigError, match="a transcoder wants two"):
        sparsepilot.attach(make("llama").model, sae, "model.layers.1")


def test_it_needs_neither_lightning_nor_hydra() -> None:
    code = (
        "import sys, sparsepilot, sparsepilot.lm.attach\n"
        "print([name for name in ('lightning', 'hydra', 'omegaconf', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
