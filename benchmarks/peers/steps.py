"""One training step of another tool each time it is told so; a worker of side_by_side.py in an environment of its own:

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
    .venv-peers/bin/pip uninstall -y torchvision     # it breaks `import transformers` beside a CPU torch
    .venv-peers/bin/python benchmarks/peers/steps.py SPECIFICATION     # JSON, from side_by_side.py

A candidate is `tool` or `tool:option+option`. Each step is the tool's own: its trainer's public step, its defaults for
everything that is not a size, fp32 activations that lie in memory.

    sae-lens               SAETrainer.step on its TrainingSAE of the architecture
        :sparse            topk only: use_sparse_activations, without rescale_acts_by_decoder_norm (with both, its
                           backward pass fails on torch 2.13)
        :autocast          SAETrainerConfig(autocast=True)
    dictionary-learning    trainer.update of its trainer of the architecture
    sparsify               topk only: SparseCoder with the calls of Trainer.fit around it in their order (no AuxK,
                           ScheduleFree SignSGD: its defaults)
        :adam              torch's Adam, its choice for optimizer="adam" where bitsandbytes is not there
    any :bf16mm            every fp32 product of the step in bf16, a switch of torch that any user could set
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1")

import torch
from activations import activations, checksum
from torch import Tensor
from worker import Channel, machine

TrainStep = Callable[[Tensor, int], Any]
"""(batch, step number) -> loss"""

STEPS = 100_000
NUM_BATCHES = 4
NESTED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Matryoshka: widths of the nested dictionaries, as shares of the whole."""


class Unsupported(Exception):
    """The tool has no such architecture or option."""


def sae_lens(arch: str, spec: dict[str, Any], options: set[str]) -> TrainStep:
    from sae_lens import saes
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    given: dict[str, Any] = {"d_in": spec["d_in"], "d_sae": spec["d_sae"], "dtype": "float32", "device": "cpu"}
    if arch in ("topk", "batchtopk", "matryoshka"):
        given["k"] = spec["k"]
    if arch == "matryoshka":
        given["matryoshka_widths"] = [round(share * spec["d_sae"]) for share in NESTED]
    if "sparse" in options:
        if arch != "topk":
            raise Unsupported("sae-lens has sparse activations for topk only")
        given |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    name = {
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "matryoshka": "MatryoshkaBatchTopK",
        "jumprelu": "JumpReLU",
        "relu": "Standard",
        "gated": "Gated",
    }[arch]
    sae = getattr(saes, f"{name}TrainingSAE")(getattr(saes, f"{name}TrainingSAEConfig")(**given))
    config = SAETrainerConfig(
        total_training_samples=STEPS * spec["batch"],
        train_batch_size_samples=spec["batch"],
        device="cpu",
        lr_end=3e-5,
        autocast="autocast" in options,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()), evaluator=None)

    def step(x_BD: Tensor, number: int) -> Any:
        out = trainer.step(x_BD)
        trainer.n_training_steps += 1  # what `fit` does after each step
        return out.losses["mse_loss"]

    return step


def dictionary_learning(arch: str, spec: dict[str, Any], options: set[str]) -> TrainStep:
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    k = spec["k"]
    # its matryoshka takes the shares of the rings between one nested dictionary and the next
    rings = [wide - narrow for narrow, wide in itertools.pairwise((0.0, *NESTED))]
    trainer_class, given = {
        "topk": (top_k.TopKTrainer, {"k": k}),
        "batchtopk": (batch_top_k.BatchTopKTrainer, {"k": k}),
        "matryoshka": (matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, {"k": k, "group_fractions": rings}),
        "jumprelu": (jumprelu.JumpReluTrainer, {"target_l0": float(k)}),
        "relu": (standard.StandardTrainer, {}),
        "gated": (gdm.GatedSAETrainer, {}),
    }[arch]
    trainer = trainer_class(
        steps=STEPS,
        activation_dim=spec["d_in"],
        dict_size=spec["d_sae"],
        layer=0,
        lm_name="none",
        device="cpu",
        seed=spec["seed"],
        **given,
    )
    return lambda x_BD, number: trainer.update(number, x_BD)


def sparsify(arch: str, spec: dict[str, Any], options: set[str]) -> TrainStep:
    if arch != "topk":
        raise Unsupported(f"sparsify trains topk (and groupmax) only, not {arch}")
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(
        spec["d_in"], SparseCoderConfig(num_latents=spec["d_sae"], k=spec["k"]), device="cpu", dtype=torch.float32
    )
    narrower = (2**14 / sae.num_latents) ** 0.5  # its rule for learning rates
    schedule: Any = None
    optimizer: Any
    if "adam" in options:
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 * narrower)
        schedule = get_linear_schedule_with_warmup(optimizer, 1000, STEPS)
    else:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 * narrower), momentum=0.95)
        optimizer.train()
    unseen_F = torch.zeros(sae.num_latents, dtype=torch.long)
    fired_F = torch.zeros(sae.num_latents, dtype=torch.bool)

    def step(x_BD: Tensor, number: int) -> Any:
        if number == 0:
            sae.b_dec.data = x_BD.mean(dim=0)
        sae.set_decoder_norm_to_unit_norm()
        variance = (x_BD - x_BD.mean(dim=0)).square().sum()
        out = sae(x=x_BD, y=x_BD, dead_mask=None, total_variance=variance)
        fired_F[out.latent_indices.flatten()] = True
        loss = out.fvu + out.multi_topk_fvu / 8
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        with torch.no_grad():
            unseen_F.add_(len(x_BD))
            unseen_F[fired_F] = 0
            fired_F.zero_()
        return out.fvu

    return step


TOOLS: dict[str, tuple[str, Callable[[str, dict[str, Any], set[str]], TrainStep], set[str]]] = {
    "sae-lens": ("sae-lens", sae_lens, {"sparse", "autocast"}),
    "dictionary-learning": ("dictionary-learning", dictionary_learning, set()),
    "sparsify": ("eai-sparsify", sparsify, {"adam"}),
}


@contextlib.contextmanager
def bf16_products() -> Any:
    """Within it, torch multiplies fp32 matrices in bf16."""
    products = torch.backends.mkldnn.matmul
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = "none"


def work(spec: dict[str, Any]) -> None:
    """A step for each `go`. `spec`: candidate, arch, d_in, d_sae, k, batch, threads, seed, dtype of the cache."""
    channel = Channel()
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    tool, _, words = spec["candidate"].partition(":")
    options = set(words.split("+")) - {""}
    try:
        package, build, known = TOOLS[tool]
        if options - known - {"bf16mm"}:
            raise Unsupported(f"{tool} has no option {', '.join(sorted(options - known - {'bf16mm'}))}")
        step = build(spec["arch"], spec, options)
    except Exception as error:  # an unsupported candidate is a result
        channel.answer(error=f"{type(error).__name__}: {error}")
        return
    # rounded as the cache stores them, but fp32 before the clock starts
    x_BD = activations(NUM_BATCHES * spec["batch"], spec["d_in"], spec["dtype"], spec["seed"])
    first = checksum(x_BD[: spec["batch"]])
    batches = x_BD.float().split(spec["batch"])
    del x_BD
    versions = {"torch": torch.__version__, package: version(package)}
    channel.answer(ready=True, checksum=first, versions=versions, machine=machine())
    precision = bf16_products if "bf16mm" in options else contextlib.nullcontext
    for number in itertools.count():
        if not channel.told_to_go():
            return
        batch = batches[number % NUM_BATCHES]
        began_s = time.perf_counter()
        try:
            with precision():
                loss = step(batch, number)
                # dictionary-learning's update returns nothing or a number, the others a tensor
                value = float(loss) if loss is not None else None
        except Exception as error:
            channel.answer(error=f"{type(error).__name__}: {error}")
            return
        channel.answer(s=time.perf_counter() - began_s, loss=value)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
