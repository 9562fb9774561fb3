"""Where the language model, the cache and a dictionary meet: the measurement that `cross_entropy=spliced` asks for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from sparsepilot.analysis.source import check_model, check_rows, check_source, held_out_contexts
from sparsepilot.data.datamodule import RunData
from sparsepilot.data.source import TextRows
from sparsepilot.errors import ConfigError
from sparsepilot.lm.devices import device_here
from sparsepilot.lm.load import load
from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import SplicedCrossEntropy
from sparsepilot.ranks import is_first
from sparsepilot.training.trainee import Sites


def spliced(
    tokens: PositiveInt = 10_000,
    every_samples: PositiveInt | None = None,
    often_tokens: PositiveInt | None = None,
    batch_contexts: PositiveInt = 4,
    dtype: Literal["auto", "float32", "bfloat16"] | None = None,
    kl: bool = True,
    *,
    data: RunData,
    sites: Sites,
    lm: Mapping[str, Any],
    shared: dict[tuple[str, str], SplicedCrossEntropy] | None = None,
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
        shared: those of the run's other trainees, by site read and site written, to which this one is added: all share
            the language model, and where the sites are the same the measurement, which keeps nothing of a dictionary.

    Raises:
        ConfigError: for sites or sizes that do not fit, or another language model than the cache was made with.
        DataError: for a language model that cannot be loaded, lacks a site, or gives other activations.
    """
    read, write = _one_of_each(sites)
    shared = {} if shared is None else shared
    if (read.name, write.name) in shared:
        return shared[read.name, write.name]
    cache = data.cache
    if not isinstance(cache, TextRows):
        raise ConfigError(
            "cross_entropy: data.path names several caches, each made by its own language model; set cross_entropy=none"
        )
    check_source(cache, lm, "cross_entropy", "set cross_entropy=none")
    if shared:
        model = next(iter(shared.values())).seam.lm
    else:
        # weights that are about to be overwritten are drawn first: training's own draws must not see it
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            device = device_here(lm.get("device", "cpu"), "lm.device")
            model = load(**{**lm, "device": device, "dtype": lm.get("dtype", "auto") if dtype is None else dtype})
        check_model(cache, model)
    contexts = held_out_contexts(cache, model, "cross_entropy")
    measurement = SplicedCrossEntropy(
        Seam(model, read.name, write.name),
        contexts,
        write.mean_D,
        tokens=tokens,
        often_tokens=often_tokens,
        batch_contexts=batch_contexts,
        kl=kl,
    )
    check_rows(cache, read.name, model, contexts)
    if not measurement.seam.restarts and is_first():
        warnings.warn(
            f"cross_entropy: {model.id} cannot be started at {write.name}, so each measurement runs the whole model",
            stacklevel=1,
        )
    shared[read.name, write.name] = measurement
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
