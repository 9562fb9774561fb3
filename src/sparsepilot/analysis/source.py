"""Whether a cache's held-out rows and a language model belong together, and the text that the rows came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsepilot.data.source import TextRows
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm.capture import capture
from sparsepilot.lm.harvest import tokenizer_hash
from sparsepilot.lm.held_out import Contexts, contexts_of_rows
from sparsepilot.lm.load import LanguageModel

_ROWS_FVU = 0.01
"""Largest share of the variance by which rows of the cache may differ from the model's own activations. On the demo:
0.0001 by other batches, 0.0002 in float32 for bfloat16, 0.012 where one early token is another."""
_CHECKED_CONTEXTS = 4


def check_source(cache: TextRows, lm: Mapping[str, Any], field: str, remedy: str) -> None:
    """Before a model is loaded: whether the cache names the one that is configured.

    Args:
        cache: a sealed cache.
        lm: fields of `lm.load.load`.
        field: begins the message.
        remedy: what to do where there is no language model.

    Raises:
        ConfigError: where the rows come from no language model, or from another one.
    """
    source = cache.source
    if "model_id" not in source:
        raise ConfigError(f"{field}: the cache at data.path = {cache} was not made by a language model; {remedy}")
    if lm.get("id") != source["model_id"]:
        recipe = source.get("recipe", {})
        gguf, revision = recipe.get("lm.gguf"), recipe.get("lm.revision")
        give = f"lm=hf lm.id={source['model_id']}"
        give += f" lm.gguf=<the file {gguf}>" if gguf else ""
        give += f" lm.revision={revision}" if revision else ""
        raise ConfigError(
            f"{field}: the cache at data.path = {cache} was made with the language model {source['model_id']}, "
            f"lm.id is {lm.get('id')}; give {give}"
        )


def check_model(cache: TextRows, model: LanguageModel) -> None:
    """ConfigError unless weights and vocabulary are those that the cache was made with."""
    source = cache.source
    for what, here, there in (
        ("weights are", model.revision, source["model_revision"]),
        ("tokenizer has the hash", tokenizer_hash(model.tokenizer), source["tokenizer_hash"]),
    ):
        if here != there:
            raise ConfigError(
                f"lm.id = {model.id}: its {what} {here}, the cache at data.path = {cache} was made with {there}; "
                "give the model that made the cache (lm.revision, lm.gguf)"
            )


def held_out_contexts(cache: TextRows, model: LanguageModel, field: str) -> Contexts:
    """The contexts of the cache's validation rows. ConfigError, begun with `field`, where it has none."""
    start, stop = cache.num_train_rows, cache.num_train_rows + cache.num_val_rows
    if start == stop:
        raise ConfigError(
            f"{field}: the cache at data.path = {cache} has no validation rows; build one with "
            "data.build.val_fraction above 0"
        )
    labels = (cache.tokens(start, stop), cache.positions(start, stop), cache.documents(start, stop))
    return contexts_of_rows(model.tokenizer, int(cache.source["context_length"]), *labels)


def check_rows(cache: TextRows, site: str, model: LanguageModel, contexts: Contexts) -> None:
    """DataError unless the language model makes, of these contexts, the rows that the cache holds.

    Nothing is checked where the tokenizer has no BOS token: such contexts lack their first token.
    """
    if model.tokenizer.bos_token_id is None:
        return
    mean_D = cache.stats(site).mean_D
    some = range(0, contexts.num_contexts, -(-contexts.num_contexts // _CHECKED_CONTEXTS))
    sq_error = sq_deviation = 0.0
    for c in some:
        tokens_1L = torch.from_numpy(contexts.tokens_CL[c : c + 1]).long()
        mask_L = torch.from_numpy(contexts.mask_CL[c])
        first = cache.num_train_rows + int(contexts.first_row_C[c])
        stored_RD = cache.read(site, first, first + int(mask_L.sum())).float()
        live_RD = capture(model, [site], tokens_1L)[site].cpu()[mask_L].float()
        sq_error += float((live_RD - stored_RD).square().sum())
        sq_deviation += float((stored_RD - mean_D).square().sum())
    if not sq_error <= _ROWS_FVU * sq_deviation:
        raise DataError(
            f"{cache}: {model.id} gives activations at {site} that differ from the cache's rows by "
            f"{sq_error / sq_deviation:.2g} of their variance ({_ROWS_FVU} is allowed, for number formats); "
            "give the model that made the cache"
        )
