"""dictionary-learning's architectures, trained by its own trainSAE; called by compare_quality.py in its environment:

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0
    .venv-peers/bin/pip uninstall -y torchvision     # it breaks `import transformers` beside a CPU torch
    .venv-peers/bin/python benchmarks/peers/train_dictionary_learning.py specification.json answer.json

Its defaults (each trainer's own initialisation, betas, decoder norm and clipping; AuxK with alpha 1/32), and from its
demo: activations divided to unit mean squared norm, learning rate rising over 10 steps and falling linearly over the
last fifth of the budget, JumpReLU aiming at `target_l0`, Matryoshka's five groups. fp32, its default on CPU. Windows
that are longer than such a short run are shares of it, see `shares` in common.py: the sparsity penalty's warm-up, the
dead latents' window (10M samples there), and when BatchTopK begins to average its threshold and how slowly.
ReLU is StandardTrainer, with its decoder's norm fixed: FVU 0.262 at L0 53, its StandardTrainerAprilUpdate 0.282 at L0
56 (learning rate 1.6e-3); `"class": "StandardTrainerAprilUpdate"` in `trainer` of the specification takes that one. Any
argument of the trainer can be set there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TQDM_MININTERVAL="60")

from common import Rows, group_sizes, run_peer, shares
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

TRAINERS: dict[str, type] = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "relu": StandardTrainer,
    "gated": GatedSAETrainer,
    "jumprelu": JumpReluTrainer,
}
DICTIONARIES: dict[str, Any] = {
    "topk": AutoEncoderTopK,
    "batchtopk": BatchTopKSAE,
    "matryoshka": MatryoshkaBatchTopKSAE,
    "relu": AutoEncoder,
    "gated": GatedAutoEncoder,
    "jumprelu": JumpReluAutoEncoder,
}


def architecture(spec: dict[str, Any], share: dict[str, int]) -> dict[str, Any]:
    """The arguments of the architecture's own trainer."""
    knob, d_sae = spec["knob"], spec["d_sae"]
    averaged = {"threshold_start_step": share["decay_start"], "threshold_beta": 0.95}  # the falling rate's steps
    match spec["architecture"]:
        case "topk":
            return {"k": round(knob)}
        case "batchtopk":
            return {"k": round(knob), **averaged}
        case "matryoshka":
            return {"k": round(knob), "group_fractions": [n / d_sae for n in group_sizes(d_sae)], **averaged}
        case "relu" | "gated":
            return {"l1_penalty": knob, "sparsity_warmup_steps": share["penalty_steps"]}
        case "jumprelu":
            return {"target_l0": knob, "sparsity_warmup_steps": share["penalty_steps"]}
        case other:
            raise SystemExit(f"dictionary-learning has no {other}")


def with_dead_window(trainer: type, samples: int) -> type:
    """The same trainer whose AuxK takes latents for dead after so many samples; it has no argument for that."""

    class Scaled(trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.dead_feature_threshold = samples

    return Scaled


def train(spec: dict[str, Any], rows: Rows) -> tuple[Any, dict[str, Any]]:
    name, share = spec["architecture"], shares(spec)
    given = dict(spec.get("trainer", {}))
    kind = (
        {"StandardTrainerAprilUpdate": StandardTrainerAprilUpdate}[given.pop("class")]
        if "class" in given
        else TRAINERS[name]
    )
    dead = given.pop("dead_feature_threshold", share["dead_steps"] * spec["batch"])
    options = {
        "warmup_steps": share["warmup_steps"],
        "decay_start": share["decay_start"],
        **architecture(spec, share),
        **given,
    }
    config = {
        "trainer": with_dead_window(kind, dead),
        "steps": share["steps"],
        "activation_dim": spec["d_in"],
        "dict_size": spec["d_sae"],
        "lr": spec["lr"],
        "seed": spec["seed"],
        "layer": 0,
        "lm_name": "cached activations",
        "device": "cpu",
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(rows, [config], share["steps"], save_dir=folder, normalize_activations=True, device="cpu")
        saved = Path(folder) / "trainer_0" / "ae.pt"  # scaled back to raw activations by trainSAE
        more = {"normalize_decoder": False} if name == "relu" else {}  # the same function; its check wants 1e-4
        sae = DICTIONARIES[name].from_pretrained(saved, device="cpu", **more)
    what = {"trainer": kind.__name__, "normalize_activations": True, "dead_feature_threshold": dead}
    return sae, {**what, **options}


if __name__ == "__main__":
    run_peer("dictionary-learning", train)
