"""The field's own evaluation of a dictionary on given tokens, in the environment of the tool; started by
test_evaluations.py:

    python eval_worker.py TOOL jobs.json

Each job names a folder with a transformers Llama (`model`), a dictionary in sae-lens's format (`sae`), a safetensors
file with `tokens` [C, L], the ids of special tokens, and where to write the figures. Nothing of sparsepilot is needed
here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class Store:
    """Stands for an activations store: given tokens, batch by batch, again from the start after a reset."""

    def __init__(self, tokens_CL: Tensor, batch: int) -> None:
        self.tokens_CL, self.store_batch_size_prompts, self.context_size = tokens_CL, batch, tokens_CL.shape[1]
        self.at = 0

    def get_batch_tokens(self, batch: int) -> Tensor:
        self.at += batch
        return self.tokens_CL[self.at - batch : self.at]

    def reset_input_dataset(self) -> None:
        self.at = 0


def hooked(folder: str) -> Any:
    """The same weights in TransformerLens, nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    c = llama.config
    d_head = c.hidden_size // c.num_attention_heads
    rope = getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=c.max_position_embeddings, d_head=d_head,
        n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size, act_fn=c.hidden_act, eps=c.rms_norm_eps, normalization_type="RMS",
        positional_embedding_type="rotary", rotary_dim=d_head, rotary_base=rope, rotary_adjacent_pairs=False,
        gated_mlp=True, final_rms=True, default_prepend_bos=False, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_llama_weights(llama, cfg), strict=False)  # what is left are causal masks
    tokens_CL = torch.arange(c.vocab_size)[None, :12]
    theirs, mine = model(tokens_CL), llama(tokens_CL).logits
    if not torch.allclose(theirs, mine, atol=1e-4):
        raise SystemExit(f"the two models differ by {(theirs - mine).abs().max()}")
    return model


def sae_lens(job: dict[str, Any], special: list[int]) -> dict[str, Any]:
    from sae_lens import SAE
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    tokens_CL = load_file(job["tokens"])["tokens"]
    num = len(tokens_CL) // job["batch"]
    metrics, features = run_evals(
        SAE.load_from_disk(job["sae"]), Store(tokens_CL, job["batch"]), hooked(job["model"]), ActivationScaler(),
        get_eval_everything_config(job["batch"], num, num),
        exclude_special_tokens=special,
    )  # fmt: skip
    return {"metrics": metrics, "features": features}


def sae_bench(job: dict[str, Any], special: list[int]) -> dict[str, Any]:
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_lens import SAE

    tokens_CL = load_file(job["tokens"])["tokens"]
    num = len(tokens_CL) // job["batch"]
    sae = SAE.load_from_disk(job["sae"])
    hook = sae.cfg.metadata.hook_name
    # where it looks for the names that sae-lens has moved into metadata since
    named = SimpleNamespace(
        hook_name=hook, hook_layer=int(hook.split(".")[1]), hook_head_index=None, d_sae=sae.cfg.d_sae
    )
    stands = SimpleNamespace(
        cfg=named, encode=sae.encode, decode=sae.decode, device=sae.device, W_enc=sae.W_enc, W_dec=sae.W_dec
    )
    config = CoreEvalConfig(
        model_name="llama", batch_size_prompts=job["batch"], n_eval_reconstruction_batches=num,
        n_eval_sparsity_variance_batches=num, compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        exclude_special_tokens_from_reconstruction=True,
    )  # fmt: skip
    metrics, features = run_evals(
        stands, Store(tokens_CL, job["batch"]), hooked(job["model"]), config, ignore_tokens=set(special)
    )
    return {"metrics": metrics, "features": features}


TOOLS = {"sae_lens": sae_lens, "sae_bench": sae_bench}


@torch.no_grad()
def main() -> None:
    os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    torch.set_num_threads(1)
    run = TOOLS[sys.argv[1]]
    for job in json.loads(Path(sys.argv[2]).read_text()):
        found = {"without": run(job, job["special"]), "with": run(job, [])}
        Path(job["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
