"""Harvesting against the bare forward pass to the last needed layer, in tokens per second.

    python benchmarks/harvest.py --json harvest.json

The bare pass is the same model cut off after the layer (later layers and the final norm removed), without hooks,
masks, conversion or stopping early. The two take turns on the same batches of contexts, so that a busy machine slows
both; a ratio is taken per batch and the median reported. 1.10 is the most that the project allows.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from output import put_json
from torch import nn

from sparsepilot.lm import harvest as lm_harvest
from sparsepilot.lm import load, pack, text


def bare_model(model: nn.Module, layer: int) -> Callable[[torch.Tensor], Any]:
    """The decoder with `layer` as its last layer, sharing weights with `model`."""
    decoder = copy.copy(model.model)
    decoder._modules = dict(model.model._modules)
    decoder.layers = model.model.layers[: layer + 1]
    decoder.norm = nn.Identity()
    return lambda tokens_CL: decoder(input_ids=tokens_CL, use_cache=False)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, without gradients."""
    with torch.no_grad():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


def measure(dtype: str, args: argparse.Namespace) -> dict[str, float | str | int]:
    with initialize_config_dir(
        os.path.abspath(os.path.join(os.path.dirname(__file__), "../conf/lm")), version_base=None
    ):
        fields = OmegaConf.to_container(compose(args.lm), resolve=True)
    started = time.perf_counter()
    lm = load.load(**{**fields, "dtype": dtype})
    load_s = time.perf_counter() - started
    packed = pack.pack(
        lm.tokenizer,
        text.documents("python_docs"),
        context_length=args.context_length,
        val_fraction=0,
        max_tokens=args.batches * args.batch_contexts * (args.context_length - 1),
    )
    sites = [f"model.layers.{args.layer}"]
    bare = bare_model(lm.model, args.layer)
    tokens_CL = torch.from_numpy(packed.tokens_CL.astype(np.int64))

    # Both must have done the same work: the first batch's rows are compared bit for bit.
    first = next(lm_harvest.harvest(lm, packed, sites, batch_contexts=args.batch_contexts, dtype=args.cache_dtype))
    with torch.no_grad():
        bare_CLD = bare(tokens_CL[: args.batch_contexts]).last_hidden_state
    mask_CL = torch.from_numpy(packed.mask_CL[: args.batch_contexts])
    if not torch.equal(bare_CLD[mask_CL].to(first.x[sites[0]].dtype), first.x[sites[0]]):
        raise SystemExit("the bare pass and the harvest disagree: they cannot be compared")

    pairs = []
    for turn in range(args.turns):
        stream = lm_harvest.harvest(lm, packed, sites, batch_contexts=args.batch_contexts, dtype=args.cache_dtype)
        for index, batch_CL in enumerate(tokens_CL.split(args.batch_contexts)):
            # Whoever runs second finds warmer memory, so they change places.
            if (turn + index) % 2:
                bare_s, harvest_s = seconds(lambda b=batch_CL: bare(b)), seconds(lambda s=stream: next(s))
            else:
                harvest_s, bare_s = seconds(lambda s=stream: next(s)), seconds(lambda b=batch_CL: bare(b))
            pairs.append((bare_s, harvest_s))
    num_tokens = tokens_CL[: args.batch_contexts].numel()
    bare_s, harvest_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "dtype": dtype,
        "site": sites[0],
        "context_length": args.context_length,
        "batch_contexts": args.batch_contexts,
        "threads": torch.get_num_threads(),
        "load_s": round(load_s, 2),
        "pairs": len(pairs),
        "bare_tokens_per_s": round(num_tokens / bare_s),
        "harvest_tokens_per_s": round(num_tokens / harvest_s),
        "ratio_median": round(statistics.median(h / b for b, h in pairs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="smollm2", help="a file of conf/lm, without .yaml")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--batch-contexts", type=int, default=8)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cache-dtype", default="float16")
    parser.add_argument("--json", metavar="FILE", help="write the results there ('-': to the output)")
    args = parser.parse_args()
    results = [measure(dtype, args) for dtype in args.dtypes]
    if args.json:
        put_json(results, args.json)
        if args.json == "-":
            return
    for result in results:
        bare, harvested = result["bare_tokens_per_s"], result["harvest_tokens_per_s"]
        print(
            f"{result['dtype']:9s} loaded in {result['load_s']} s; tokens/s bare {bare}, harvest {harvested}; "
            f"time ratio {result['ratio_median']} (median of {result['pairs']} batches)"
        )


if __name__ == "__main__":
    main()
