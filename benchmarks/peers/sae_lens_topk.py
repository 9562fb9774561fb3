"""sae-lens's TopK, trained by its own SAETrainer.fit; called by compare_quality.py in an environment of its own:

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0
    .venv-peers/bin/pip uninstall -y torchvision     # it breaks `import transformers` beside a CPU torch

Its defaults throughout (decoder rows start at norm 0.1, encoder tied, b_dec 0, TopK on activations rescaled by decoder
norms, AuxK with coefficient 1, Adam (0.9, 0.999), gradient norm clipped to 1), and from the training guide: inputs
scaled by `expected_average_only_in`, constant learning rate without warm-up that falls over the last fifth of the
budget. The scale is estimated on the training stream before training, without using it up. Its guide's short TopK
example leaves the scaling at its default, `none`; `"normalize_activations": "none"` in the specification runs that.
"""

from __future__ import annotations

import os
from itertools import chain, repeat
from typing import Any

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TQDM_MININTERVAL="60")

from common import Rows, run_peer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer


def train(spec: dict[str, Any], rows: Rows) -> tuple[Any, dict[str, Any]]:
    normalize = spec.get("normalize_activations", "expected_average_only_in")
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=spec["d_in"], d_sae=spec["d_sae"], k=spec["k"], device="cpu", normalize_activations=normalize
        )
    )
    cfg = SAETrainerConfig(
        total_training_samples=spec["samples"],
        train_batch_size_samples=spec["batch"],
        lr=spec["lr"],
        lr_end=spec["lr"] / 10,  # its runner's default; a constant schedule does not use it
        lr_decay_steps=spec["samples"] // spec["batch"] // 5,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(rows), evaluator=None)
    scale = None
    if normalize == "expected_average_only_in":
        again = chain.from_iterable(repeat(rows))
        batches = min(cfg.n_batches_for_norm_estimate, len(rows))
        trainer.activation_scaler.estimate_scaling_factor(spec["d_in"], again, batches)  # `fit` keeps what it finds
        scale = trainer.activation_scaler.scaling_factor
    trained = trainer.fit()
    trained.eval()
    return trained, {"normalize_activations": normalize, "scale": scale, "lr_decay_steps": cfg.lr_decay_steps}


if __name__ == "__main__":
    run_peer("sae-lens", train)
