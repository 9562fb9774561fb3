"""Where the language model, the cache and a dictionary meet: the measurement that `cross_entropy=spliced` asks for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from sparsepilot.data.cache import Cache
from sparsepilot.data.datamodule import ActivationData
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm.capture import capture
from sparsepilot.lm.harvest import tokenizer_hash
from sparsepilot.lm.held_out import Contexts, contexts_of_rows
from sparsepilot.lm.load import LanguageModel, load
from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import SplicedCrossEntropy
from sparsepilot.training.trainee import Sites

_ROWS_FVU = 0.01
"""Largest share of the variance by which rows of the cache may differ from the model's own activations. On the demo:
0.0001 by other batches, 0.0002 in float32 for bfloat16, 0.012 where one early token is another."""
_CHECKED_CONTEXTS = 4


def spliced(
    tokens: PositiveInt = 10_000,
    every_samples: PositiveInt | None = None,
    often_tokens: PositiveInt | None = None,
    batch_contexts: PositiveInt = 4,
    dtype: Literal["auto", "float32", "bfloat16"] | None = None,
    kl: bool = True,
    *,
    data: ActivationData,
    sites: Sites,
    lm: Mapping[str, Any],
) -> SplicedCrossEntropy:
    """The measurement for a dictionary, on the validation rows of the cache that it is trained on.

    The text is not tokenized again: a cache keeps token, position and document of every row, and their contexts are
    told from those (`lm.held_out`). So it is the cache's own text without a look at where it came from; that the
    language model is the one that made the cache is checked by revision, by tokenizer and by the rows themselves.

    Args:
        tokens: predictions at least, of validations.
        every_samples: measure between validations, too, so many samples apart; None: at validations alone.
        often_tokens: predictions at least, between validations; None: as many.
        batch_contexts: contexts per pass of the language model.
        dtype: of the language model; None: `lm.dtype`.
        kl: whether the last validation gives the KL divergence, too.
        data: of the run.
        sites: what the dictionary reads and writes.
        lm: fields of `lm.load.load`.

    Raises:
        ConfigError: for sites or sizes that do not fit, or another language model than the cache was made with.
        DataError: for a language model that cannot be loaded, lacks a site, or gives other activations.
    """
    read, write = _one_of_each(sites)
    cache = data.cache
    if not isinstance(cache, Cache):
        raise ConfigError(
            "cross_entropy: data.path names several caches, each made by its own language model; set cross_entropy=none"
        )
    _check_source(cache, lm)
    # weights that are about to be overwritten are drawn first: training's own draws must not see it
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model = load(**{**lm, "dtype": lm.get("dtype", "auto") if dtype is None else dtype})
    _check_model(cache, model)
    contexts = _contexts(cache, model)
    measurement = SplicedCrossEntropy(
        Seam(model, read.name, write.name),
        contexts,
        write.mean_D,
        tokens=tokens,
        often_tokens=often_tokens,
        batch_contexts=batch_contexts,
        kl=kl,
    )
    if model.tokenizer.bos_token_id is not None:
        _check_rows(cache, read.name, model, contexts)
    if not measurement.seam.restarts:
        warnings.warn(
            f"cross_entropy: {model.id} cannot be started at {write.name}, so each measurement runs the whole model",
            stacklevel=1,
        )
    return measurement


def _one_of_each(sites: Sites) -> tuple[Any, Any]:
    writes = sites.reads if sites.writes is None else sites.writes
    if len(sites.reads) != 1 or len(writes) != 1:
        kind = "crosscoder" if sites.writes is None else "transcoder"
        named = ", ".join(site.name for site in (*sites.reads, *(sites.writes or ())))
        raise ConfigError(
            f"cross_entropy: a {kind} of several sites ({named}) has no one place to be spliced in; it is measured for "
            "dictionaries that read one site and write one; set cross_entropy=none"
        )
    return sites.reads[0], writes[0]


def _check_source(cache: Cache, lm: Mapping[str, Any]) -> None:
    source = cache.source
    if "model_id" not in source:
        raise ConfigError(
            f"cross_entropy: the cache at data.path = {cache} was not made by a language model; set cross_entropy=none"
        )
    if lm["id"] != source["model_id"]:
        recipe = source.get("recipe", {})
        gguf, revision = recipe.get("lm.gguf"), recipe.get("lm.revision")
        give = f"lm=hf lm.id={source['model_id']}"
        give += f" lm.gguf=<the file {gguf}>" if gguf else ""
        give += f" lm.revision={revision}" if revision else ""
        raise ConfigError(
            f"cross_entropy: the cache at data.path = {cache} was made with the language model {source['model_id']}, "
            f"lm.id is {lm['id']}; give {give}"
        )


def _check_model(cache: Cache, model: LanguageModel) -> None:
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


def _contexts(cache: Cache, model: LanguageModel) -> Contexts:
    start, stop = cache.num_train_rows, cache.num_train_rows + cache.num_val_rows
    if start == stop:
        raise ConfigError(
            f"cross_entropy: the cache at data.path = {cache} has no validation rows; build one with "
            "data.build.val_fraction above 0"
        )
    labels = (cache.tokens(start, stop), cache.positions(start, stop), cache.documents(start, stop))
    return contexts_of_rows(model.tokenizer, int(cache.source["context_length"]), *labels)


def _check_rows(cache: Cache, site: str, model: LanguageModel, contexts: Contexts) -> None:
    """DataError unless the language model makes, of these contexts, the rows that the cache holds."""
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
