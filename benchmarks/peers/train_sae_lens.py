"""sae-lens's architectures, trained by its own SAETrainer.fit; called by compare_quality.py in its environment:

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0
    .venv-peers/bin/pip uninstall -y torchvision     # it breaks `import transformers` beside a CPU torch
    .venv-peers/bin/python benchmarks/peers/train_sae_lens.py specification.json answer.json

Its defaults (decoder rows start at norm 0.1, encoder tied, biases 0, Adam (0.9, 0.999), gradient norm clipped to 1, the
TopK family on activations rescaled by decoder norms with AuxK), and from its training guide: inputs scaled by
`expected_average_only_in`, learning rate constant and falling over the last fifth of the budget. The scale is estimated
on the training stream before training, without using it up. Windows that are longer than such a short run are shares of
it, see `shares` in common.py (with the dead window as it is, FVU of TopK was 0.1747 instead of 0.1627 at 1.6e-3).
Measured is what the tool saves for inference and loads again: for BatchTopK and Matryoshka a JumpReLU with the
threshold that training averaged (over about 20 steps, as for the other tool, not 100: with 100 it lags behind, L0 30
for k 32).
JumpReLU is its Anthropic variant (TANH below): its default, the step loss, moves a threshold by at most the learning
rate in a step and was at L0 358 and 541 after 400 steps with coefficients 1 and 10 (learning rate 1.6e-3).
Any field of SAETrainerConfig or of the architecture's configuration can be set by `trainer` and `sae` in the
specification.
"""

from __future__ import annotations

import os
import tempfile
from itertools import chain, repeat
from typing import Any

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TQDM_MININTERVAL="60")

from common import Rows, group_sizes, run_peer, shares
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAE
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

CLASSES: dict[str, tuple[type, type]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}

TANH = {
    "jumprelu_sparsity_loss_mode": "tanh",
    "jumprelu_bandwidth": 2.0,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_ste_to_input": True,
    "pre_act_loss_coefficient": 3e-6,
}


def architecture(spec: dict[str, Any], share: dict[str, int]) -> dict[str, Any]:
    """The fields of the architecture's own configuration."""
    knob, warm_up = spec["knob"], share["penalty_steps"]
    match spec["architecture"]:
        case "topk":
            return {"k": round(knob)}
        case "batchtopk":
            return {"k": round(knob), "topk_threshold_lr": 0.05}
        case "matryoshka":
            sizes = group_sizes(spec["d_sae"])
            widths = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return {"k": round(knob), "topk_threshold_lr": 0.05, "matryoshka_widths": widths}
        case "relu" | "gated":
            return {"l1_coefficient": knob, "l1_warm_up_steps": warm_up}
        case "jumprelu":
            return {"l0_coefficient": knob, "l0_warm_up_steps": warm_up, **TANH}
        case other:
            raise SystemExit(f"sae-lens has no {other}")


def train(spec: dict[str, Any], rows: Rows) -> tuple[Any, dict[str, Any]]:
    share = shares(spec)
    normalize = spec.get("normalize_activations", "expected_average_only_in")
    own = {**architecture(spec, share), **spec.get("sae", {})}
    kind, config = CLASSES[spec["architecture"]]
    sae = kind(config(d_in=spec["d_in"], d_sae=spec["d_sae"], device="cpu", normalize_activations=normalize, **own))
    options = {
        "lr_warm_up_steps": 0,
        "lr_decay_steps": share["decay_steps"],
        "dead_feature_window": share["dead_steps"],
        **spec.get("trainer", {}),
    }
    cfg = SAETrainerConfig(
        total_training_samples=spec["samples"],
        train_batch_size_samples=spec["batch"],
        lr=spec["lr"],
        lr_end=spec["lr"] / 10,  # its runner's default; a constant schedule does not use it
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        **options,
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(rows), evaluator=None)
    scale = None
    if normalize == "expected_average_only_in":
        again = chain.from_iterable(repeat(rows))
        batches = min(cfg.n_batches_for_norm_estimate, len(rows))
        trainer.activation_scaler.estimate_scaling_factor(spec["d_in"], again, batches)  # `fit` keeps what it finds
        scale = trainer.activation_scaler.scaling_factor
    trained = trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        saved = SAE.load_from_disk(folder, device="cpu")
    saved.eval()
    return saved, {"normalize_activations": normalize, "scale": scale, **own, **options}


if __name__ == "__main__":
    run_peer("sae-lens", train)
