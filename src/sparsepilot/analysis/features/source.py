"""What features are described from: a run's dictionary, its cache, and of its language model its words."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepilot.data.cache import Cache
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.interop.dictionary import CONFIG, TENSORS, Dictionary
from sparsepilot.interop.load import load as load_dictionary
from sparsepilot.lm.harvest import tokenizer_hash
from sparsepilot.lm.load import LanguageModel, load_fields
from sparsepilot.run_folder import RunFolder
from sparsepilot.saved import read_config


class Words(NamedTuple):
    """What a language model says of its tokens."""

    texts: list[str]
    """Of each token id; a token that is a part of a character is a replacement character."""
    embedding_VD: Tensor
    """fp32"""
    unembedding_VD: Tensor
    """fp32, with the final norm's scale folded in: see `unembedding`"""


class Source(NamedTuple):
    sae: Dictionary
    cache: Cache
    model_id: str
    words: Words
    digest: str
    """Of the dictionary's file and the cache: equal digests mean equal features."""


def open_source(run_dir: str, cache_path: str | None = None) -> Source:
    """Opens the dictionary of a run whose training has ended, its cache and its language model.

    Args:
        run_dir: of a run on activations of a language model.
        cache_path: a cache of the same model and sites to read instead of the run's.

    Raises:
        CheckpointError: when there is no dictionary, or it is damaged.
        ConfigError: when the run has no language model, or one that did not make the cache.
        DataError: when the cache or the model cannot be opened.
    """
    folder = RunFolder(run_dir)
    if not folder.exists():
        raise ConfigError(f"run_dir = {run_dir}: there is no run here (no config.yaml)")
    sae = load_dictionary(folder.path)
    config = read_config(folder)
    if not sae.cfg.get("sites"):
        raise ConfigError(f"run_dir = {run_dir}: its {CONFIG} does not name the sites that the dictionary reads")
    path = cache_path or config["data"].get("path")
    if path is None:
        raise ConfigError(
            f"run_dir = {run_dir}: its rows were live and are not kept; give a cache of its sites, cache=..."
        )
    if not isinstance(path, str):
        raise ConfigError(
            f"run_dir = {run_dir}: its data.path names several caches, whose tokens are read by several models; the "
            "features of a run on one cache can be shown"
        )
    cache = Cache(path, sae.cfg["sites"])
    if "model_id" not in cache.source:
        raise ConfigError(
            f"run_dir = {run_dir}: the cache at {path} was not made by a language model, so its rows have no text"
        )
    trained_on = sae.cfg.get("cache_fingerprint")
    if cache_path is None and trained_on is not None and cache.fingerprint != trained_on:
        raise DataError(f"{path}: is not the cache that {run_dir} was trained on; cache=... names another one to read")
    found = [cache.widths[site] for site in sae.cfg["sites"]]
    if sum(found) != sae.cfg["d_in"]:
        raise DataError(f"{path}: its sites have widths {found}, the dictionary reads {sae.cfg['d_in']} columns")
    lm = {**config["lm"], "dtype": "float32"}
    if lm.get("id") != cache.source["model_id"]:
        raise ConfigError(
            f"run_dir = {run_dir}: its lm.id is {lm.get('id')}, the cache at {path} was made with "
            f"{cache.source['model_id']}; without that model's tokenizer the rows have no text"
        )
    model = load_fields(lm)
    here, there = tokenizer_hash(model.tokenizer), cache.source["tokenizer_hash"]
    if here != there:
        raise ConfigError(
            f"lm.id = {model.id}: its tokenizer has the hash {here}, that of the cache at {path} has {there}; give the "
            "model that made the cache"
        )
    with open(folder.path / TENSORS, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256(f"{weights} {cache.fingerprint}".encode()).hexdigest()
    return Source(sae, cache, model.id, words_of(model), digest)


def words_of(model: LanguageModel) -> Words:
    """Token texts, embedding and unembedding of a language model."""
    embedding_VD = model.model.get_input_embeddings().weight.detach().float().cpu()
    return Words(token_texts(model.tokenizer, len(embedding_VD)), embedding_VD, unembedding(model))


def token_texts(tokenizer: Any, num_tokens: int) -> list[str]:
    """How each token reads within a text, a leading space included.

    A tokenizer may drop the space of a text's first token, so each is decoded behind another one.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    lead = tokenizer.decode(anchor, **options)
    known = min(num_tokens, len(tokenizer))
    pairs = tokenizer.batch_decode([[*anchor, token] for token in range(known)], **options)
    texts = [text[len(lead) :] if text.startswith(lead) else text for text in pairs]
    return texts + [f"<{token}>" for token in range(known, num_tokens)]  # rows of the embedding that no token uses


@torch.no_grad()
def unembedding(model: LanguageModel) -> Tensor:
    """[V, D] fp32: what a direction in the residual stream adds to each token's logit, up to a factor of its row.

    With the final norm n(x) = gamma * (x - m(x)) / s(x) + beta, where s is the root of the mean square and m the mean
    over the columns (LayerNorm) or 0 (RMSNorm), the logits W_U n(x) change with x along d, s held fixed, by
    W_U (gamma * (d - m(d))) / s. Folded in here: W = W_U * gamma, less its mean over the columns for a LayerNorm; then
    its mean over the tokens, which no probability depends on, is subtracted. s, the same for all tokens, is left out.
    gamma and whether the mean is taken off are measured by two inputs, so any norm with this formula will do.
    """
    head = model.model.get_output_embeddings().weight.detach().float()
    width = head.shape[1]
    norm = _final_norm(model, width)
    W_VD = head
    if norm is not None:
        sign_D = torch.ones(width)
        sign_D[1::2] = -1
        like = next(norm.parameters())
        ends = norm(torch.stack([sign_D, -sign_D, torch.ones(width), -torch.ones(width)]).to(like)).float().cpu()
        gamma_D = sign_D * (ends[0] - ends[1]) / 2
        W_VD = head.cpu() * gamma_D
        if bool((ends[2] - ends[3]).abs().max() < 1e-3 * gamma_D.abs().max()):  # a constant vanishes: a LayerNorm
            W_VD = W_VD - W_VD.mean(dim=1, keepdim=True)
    centred_VD: Tensor = W_VD.cpu() - W_VD.mean(dim=0).cpu()
    return centred_VD


def _final_norm(model: LanguageModel, width: int) -> torch.nn.Module | None:
    """The last norm beside the layers, not in one: `model.norm`, `transformer.ln_f`, `gpt_neox.final_layer_norm`."""
    found = None
    for name, module in model.model.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,)
        if is_norm and not any(part.isdigit() for part in name.split(".")) and "embed" not in name:
            found = module
    return found
