"""What an evaluation costs, beside the language model's own forward passes over the same text.

    python benchmarks/evaluate.py runs/demo --json -

Needs a run on a language model's cache, such as the demo. `held_out_pass` is one plain forward pass over all held-out
contexts, with logits, as a script would call the model; `text_pass` is one over the contexts that the evaluation runs
through the model. The evaluation replaces the site by four things, so plain hooks would make five passes of it.
Seconds are of the process's own CPU time with one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from output import put_json

from sparsepilot.analysis.evaluate import evaluate, open_subject
from sparsepilot.analysis.source import held_out_contexts
from sparsepilot.lm.load import load
from sparsepilot.process_memory import keep_freed_memory

PASSES = 5  # clean, reconstruction, zeros, mean, zeros everywhere


@torch.no_grad()
def pass_cpu_s(lm: Any, tokens_CL: torch.Tensor, batch_contexts: int) -> float:
    """CPU seconds of one plain pass."""
    began_s = time.process_time()
    for tokens_BL in tokens_CL.split(batch_contexts):
        lm.model(input_ids=tokens_BL, use_cache=False)
    return time.process_time() - began_s


def measure(args: argparse.Namespace) -> dict[str, Any]:
    subject = open_subject(args.run_dir, args.cache)
    lm = load(**subject.lm)
    contexts = held_out_contexts(subject.cache, lm, "run_dir")
    tokens_CL = torch.from_numpy(contexts.tokens_CL).long()
    pass_cpu_s(lm, tokens_CL[: args.batch_contexts], args.batch_contexts)  # first touches
    held_out_s = pass_cpu_s(lm, tokens_CL, args.batch_contexts)
    found, _ = evaluate(
        subject, tokens=args.tokens, batch_contexts=args.batch_contexts,
        language_models={json.dumps(subject.lm, sort_keys=True): lm},
    )  # fmt: skip
    num_contexts = found["language_model"]["num_contexts"]
    text_s = held_out_s * num_contexts / len(tokens_CL)
    whole_s = found["cost"]["rows_cpu_s"] + found["cost"]["text_cpu_s"]
    return {
        "run": args.run_dir,
        "d_sae": found["latents"]["d_sae"],
        "dtype": found["language_model"]["dtype"],
        "held_out_contexts": len(tokens_CL),
        "text_contexts": num_contexts,
        "predictions": found["language_model"]["num_predictions"],
        "rows": found["rows"]["num_rows"],
        "held_out_pass_cpu_s": round(held_out_s, 2),
        "text_pass_cpu_s": round(text_s, 2),
        **{name: found["cost"][name] for name in ("rows_cpu_s", "text_cpu_s")},
        "evaluation_per_held_out_pass": round(whole_s / held_out_s, 3),
        "evaluation_per_own_passes": round(whole_s / (PASSES * text_s), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    parser.add_argument("--cache")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--batch-contexts", type=int, default=4)
    parser.add_argument("--json", help="a file, or - for the screen")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    put_json(measure(args), args.json or "-")


if __name__ == "__main__":
    main()
