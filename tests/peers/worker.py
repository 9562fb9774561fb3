"""Another tool's own code on files of its format, in the tools' environment; started by test_round_trips.py:

    python worker.py TOOL jobs.json

A job loads `folder` with the tool's loader, or makes a dictionary of `case` with the tool's classes and saves it there
with the tool's saver; then it writes {codes, decoded, y} on the rows of `x` into the safetensors file `answer`. Nothing
of sparsepilot is needed here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D, F = 24, 80
Answer = dict[str, Tensor]


def scramble(module: nn.Module, seed: int) -> None:
    """Parameters as training may have left them: biases and thresholds other than 0, decoder rows of any norm."""
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=make)
            if "threshold" in name:
                parameter.copy_(0.5 * noise.abs())
            elif parameter.ndim > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)


# ------------------------------------------------------------------------------------------------------- sae-lens


def saelens_load(folder: str, x: Tensor) -> Answer:
    if Path(folder, "params.npz").exists():
        return gemma_load(folder, x)
    from sae_lens import SAE

    return saelens_answer(SAE.load_from_disk(folder), x)


def saelens_answer(sae: Any, x: Tensor) -> Answer:
    codes = sae.encode(x)
    return {"codes": codes, "decoded": sae.decode(codes), "y": sae(x)}


def saelens_make(case: str, folder: str, x: Tensor) -> Answer:
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    architecture, _, option = case.partition(":")
    sizes: dict[str, Any] = {"d_in": D, "d_sae": F}
    if architecture == "batchtopk":  # what its training saves for inference
        training = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=7.0, rescale_acts_by_decoder_norm=True))
        scramble(training, 3)
        training.topk_threshold.fill_(0.8)
        training.save_inference_model(folder)
        return saelens_load(folder, x)
    sae_class, config_class = get_sae_class(architecture)
    if "transcoder" in architecture:
        sizes |= {"d_out": D + 5, "apply_b_dec_to_input": False}
    elif option == "reads_x":
        sizes |= {"apply_b_dec_to_input": False}
    if architecture == "topk":
        sizes |= {"k": 7, "rescale_acts_by_decoder_norm": option == "rescaled"}
    sae = sae_class(config_class(**sizes))
    scramble(sae, 3)
    sae.save_model(folder)
    return saelens_answer(sae, x)


def gemma_load(folder: str, x: Tensor) -> Answer:
    """Gemma Scope's params.npz as sae-lens reads an SAE, its download replaced by the file."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    loaders.hf_hub_download = lambda **_: str(Path(folder) / "params.npz")
    _, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_7"
    )
    d_in, d_sae = state["W_enc"].shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    sae.load_state_dict(state)
    return saelens_answer(sae, x)


# ------------------------------------------------------------------------------------------------------- sparsify


def sparsify_load(folder: str, x: Tensor) -> Answer:
    from sparsify import SparseCoder

    return sparsify_answer(SparseCoder.load_from_disk(folder), x)


def sparsify_answer(sae: Any, x: Tensor) -> Answer:
    values, ids, _ = sae.encode(x)
    codes = torch.zeros(len(x), sae.num_latents).scatter(1, ids, values)
    return {"codes": codes, "decoded": sae.decode(values, ids), "y": sae(x).sae_out}


def sparsify_make(case: str, folder: str, x: Tensor) -> Answer:
    from sparsify import SparseCoder, SparseCoderConfig

    cfg = SparseCoderConfig(
        expansion_factor=3, num_latents=0 if case == "expansion" else F, k=7,
        transcode="transcode" in case, skip_connection="skip" in case,
    )  # fmt: skip
    sae = SparseCoder(D, cfg)
    scramble(sae, 4)
    sae.save_to_disk(folder)
    return sparsify_answer(sae, x)


# --------------------------------------------------------------------------------------------- dictionary-learning


def dictionary_learning_load(folder: str, x: Tensor) -> Answer:
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(folder, "cpu")
    codes = sae.encode(x)
    return {"codes": codes, "decoded": sae.decode(codes), "y": sae(x)}


def dictionary_learning_make(case: str, folder: str, x: Tensor) -> Answer:
    from dictionary_learning import trainers
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    at = {"steps": 20_000, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "a/model", "device": "cpu"}
    at |= {"submodule_name": "resid_post_layer_3"}
    if case == "gated":
        from dictionary_learning.trainers.gdm import GatedSAETrainer

        trainer = GatedSAETrainer(**at)
    elif case == "jumprelu":
        trainer = JumpReluTrainer(**at)
    elif case == "matryoshka":
        trainer = MatryoshkaBatchTopKTrainer(**at, k=7, group_fractions=[0.25, 0.75])
    elif case in ("topk", "batchtopk", "batchtopk-untrained"):
        trainer = (trainers.TopKTrainer if case == "topk" else trainers.BatchTopKTrainer)(**at, k=7)
    else:
        from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

        trainer = StandardTrainerAprilUpdate(**at)
    scramble(trainer.ae, 5)
    if case in ("batchtopk", "matryoshka"):
        trainer.ae.threshold.fill_(0.7)
    Path(folder).mkdir(parents=True)
    # as its trainSAE saves
    torch.save(trainer.ae.state_dict(), f"{folder}/ae.pt")
    Path(folder, "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {}}))
    return dictionary_learning_load(folder, x)


# -------------------------------------------------------------------------------------------------- circuit-tracer


def circuit_tracer_load(folder: str, x: Tensor) -> Answer:
    if Path(folder).suffix == ".npz":
        from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

        return transcoder_answer(load_gemma_scope_transcoder(folder, 3), x)
    if Path(folder, "W_enc_0.safetensors").exists():
        from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

        return clt_answer(load_clt(folder, lazy_decoder=False, dtype=torch.float32), x)
    from circuit_tracer.transcoder import load_transcoder_set

    paths = sorted(Path(folder).glob("layer_*.safetensors"))
    every = load_transcoder_set(dict(enumerate(map(str, paths))), "", "mlp.hook_in", "hook_mlp_out", lazy_encoder=False)
    if len(paths) == 1:
        return transcoder_answer(every[0], x)
    stacked = x.expand(len(paths), *x.shape)
    codes = every.encode(stacked)
    y = every.decode(codes, stacked)
    return {"codes": codes.contiguous(), "decoded": y, "y": y}


def transcoder_answer(transcoder: Any, x: Tensor) -> Answer:
    codes = transcoder.encode(x)
    skip = 0 if transcoder.W_skip is None else transcoder.compute_skip(x)
    return {"codes": codes, "decoded": transcoder.decode(codes, x) - skip, "y": transcoder(x)}


def clt_answer(clt: Any, x: Tensor) -> Answer:
    """Layers side by side: [B, layers * width]."""
    x_LBD = x.view(len(x), clt.n_layers, -1).transpose(0, 1)
    codes = clt.encode(x_LBD)
    # its decode ends with the last position that is active
    y = clt.b_dec[:, None].expand_as(x_LBD).clone()
    decoded = clt.decode(codes)
    y[:, : decoded.shape[1]] = decoded
    flat = [t.transpose(0, 1).flatten(1) for t in (codes, y)]
    return {"codes": flat[0], "decoded": flat[1], "y": flat[1]}


def circuit_tracer_make(case: str, folder: str, x: Tensor) -> Answer:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    at: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    config = {"model_name": "a/model", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    if case.startswith("clt"):
        kind = "jump_relu" if "jump" in case else "relu"
        clt = CrossLayerTranscoder(3, F // 4, D // 3, kind, lazy_decoder=False, **at)
        scramble(clt, 6)
        clt.to_safetensors(folder)
        answer = clt_answer(clt, x)
        config["model_kind"] = "cross_layer_transcoder"
    else:
        activation = JumpReLU(torch.zeros(F)) if "jump" in case else nn.functional.relu
        transcoder = SingleLayerTranscoder(D, F, activation, 0, skip_connection="skip" in case, **at)
        scramble(transcoder, 6)
        TranscoderSet({0: transcoder}, "mlp.hook_in", "hook_mlp_out").to_safetensors(folder)
        answer = transcoder_answer(transcoder, x)
        config["model_kind"] = "transcoder_set"
    Path(folder, "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in config.items()))
    return answer


TOOLS: dict[str, tuple[Callable[..., Answer], Callable[..., Answer]]] = {
    "saelens": (saelens_load, saelens_make),
    "sparsify": (sparsify_load, sparsify_make),
    "dictionary_learning": (dictionary_learning_load, dictionary_learning_make),
    "circuit_tracer": (circuit_tracer_load, circuit_tracer_make),
}


@torch.no_grad()
def main() -> None:
    os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", SPARSIFY_DISABLE_TRITON="1")
    load, make = TOOLS[sys.argv[1]]
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[2]).read_text()):
        x = load_file(job["x"])["x"]
        answer = make(job["case"], job["folder"], x) if "case" in job else load(job["folder"], x)
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in answer.items()}, job["answer"])


if __name__ == "__main__":
    main()
