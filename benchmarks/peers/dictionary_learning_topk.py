"""dictionary-learning's TopK, trained by its own trainSAE; called by compare_quality.py in an environment of its own:

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0
    .venv-peers/bin/pip uninstall -y torchvision     # it breaks `import transformers` beside a CPU torch

Its defaults throughout (tied unit-norm decoder, b_dec at the geometric median of the first batch, AuxK with alpha 1/32,
Adam (0.9, 0.999), gradient norm clipped to 1), and from its demo: activations divided to unit mean squared norm,
warm-up of 10 steps, learning rate falling linearly over the last fifth of the budget. fp32, its default on CPU. Its
automatic learning rate at 4096 latents is 4e-4.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TQDM_MININTERVAL="60")

from common import Rows, run_peer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

WARMUP_STEPS = 10
DECAY_START = 0.8


def train(spec: dict[str, Any], rows: Rows) -> tuple[Any, dict[str, Any]]:
    steps = spec["samples"] // spec["batch"]
    options = {"warmup_steps": WARMUP_STEPS, "decay_start": int(DECAY_START * steps)}
    config = {
        "trainer": TopKTrainer,
        "steps": steps,
        "activation_dim": spec["d_in"],
        "dict_size": spec["d_sae"],
        "k": spec["k"],
        "lr": spec["lr"],
        "seed": spec["seed"],
        "layer": 0,
        "lm_name": "cached activations",
        "device": "cpu",
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(rows, [config], steps, save_dir=folder, normalize_activations=True, device="cpu")
        saved = Path(folder) / "trainer_0" / "ae.pt"  # scaled back to raw activations by trainSAE
        sae = AutoEncoderTopK.from_pretrained(saved, k=spec["k"], device="cpu")
    return sae, {"normalize_activations": True, **options}


if __name__ == "__main__":
    run_peer("dictionary-learning", train)
