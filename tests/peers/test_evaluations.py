"""Our evaluation gives the numbers of the field's own code, on the same tokens, weights and dictionary.

A small Llama with random weights, whose own samples are the text (so that it predicts them, and ablations do harm); its
weights run in transformers here and in TransformerLens there. sae-lens lives in the environment of `make peers`;
SAEBench asks for an older numpy and has its own (`make saebench`, or the Python that SPARSEPILOT_SAEBENCH names).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="the [lm] extra is not installed")

from rich.console import Console

from sparsepilot.analysis.evaluate import evaluate, open_subject
from sparsepilot.analysis.source import held_out_contexts
from sparsepilot.caching import build_cache
from sparsepilot.interop.export import export
from sparsepilot.lm.load import load
from sparsepilot.run import train

PYTHONS = {
    "sae_lens": Path(os.environ.get("SPARSEPILOT_PEERS", ROOT / ".venv-peers" / "bin" / "python")),
    "sae_bench": Path(os.environ.get("SPARSEPILOT_SAEBENCH", ROOT / ".venv-saebench" / "bin" / "python")),
}
pytestmark = pytest.mark.slow  # the other tools take half a minute to import
WITHIN = 0.01
LENGTH, DOCUMENTS, VOCABULARY = 128, 160, 61


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's folder with weights and a tokenizer of one word per token, and `texts/` that it wrote."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that layers matter
        model.lm_head.weight.mul_(3)  # and it is sure of something
    model.save_pretrained(folder)
    special = torch.tensor([0, 1, 2])
    tokens_CL = torch.ones(DOCUMENTS, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(LENGTH - 2):
            logits_CV = model(tokens_CL).logits[:, -1].index_fill(1, special, -torch.inf)
            tokens_CL = torch.cat([tokens_CL, torch.multinomial(logits_CV.softmax(1), 1)], dim=1)
    (folder / "texts").mkdir()
    for number, tokens_L in enumerate(tokens_CL[:, 1:].tolist()):
        # with <s> before and </s> behind it is a context of its own
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words[token] for token in tokens_L))
    return folder


@pytest.fixture(scope="module")
def cache(llama: Path) -> Path:
    recipe = {"_target_": "sparsepilot.caching.build_from_lm", "context_length": LENGTH, "dtype": "float32"}
    data = {"path": str(llama / "cache"), "sites": ["model.layers.1"], "build": recipe | {"val_fraction": 0.2}}
    lm = {"id": str(llama), "gguf": None, "dtype": "float32"}
    text = {"source": "files", "paths": [f"{llama}/texts/*.txt"]}
    build_cache(data, lm, text, console=Console(quiet=True))
    return llama / "cache"


MODELS = {"topk": ("model=topk", "model.k=6"), "jumprelu": ("model=jumprelu", "model.coefficient=0.1")}


@pytest.mark.timeout(900)  # where nothing of theirs is in memory yet, or the machine is busy, importing takes minutes
@pytest.mark.parametrize("tool", PYTHONS)
def test_the_fields_own_code_gives_our_figures(
    compose_cfg: Any, llama: Path, cache: Path, tmp_path: Path, tool: str
) -> None:
    if not PYTHONS[tool].exists():
        pytest.skip(f"{tool} is not installed: no {PYTHONS[tool]}; make peers saebench")
    lm = load(str(llama), dtype="float32")
    jobs, mine = [], {}
    for model, options in MODELS.items():
        folder = tmp_path / model
        train(
            compose_cfg(
                "data=cache", f"data.path={cache}", "data.sites=[model.layers.1]", "data.num_streams=8", "lm=hf",
                f"lm.id={llama}", "lm.dtype=float32", *options, "model.d_sae=96", "batch=256", "samples=40_960",
                "optimizer.lr=3e-3", "schedule.lr=3e-3", "logger=none", "report=false", f"run_dir={folder}/run",
            )
        )  # fmt: skip
        subject = open_subject(str(folder / "run"))
        mine[model] = evaluate(subject, tokens=None, rows=None)
        contexts = held_out_contexts(subject.cache, lm, "test")  # type: ignore[arg-type]
        tokens_CL = torch.from_numpy(contexts.tokens_CL[:, :-1].astype(np.int64))  # without </s>: it is not predicted
        export([subject.sae], "saelens", folder / "sae")
        save_file({"tokens": tokens_CL.contiguous()}, folder / "tokens")
        places = {name: str(folder / name) for name in ("sae", "tokens", "answer")}
        jobs.append({"model": str(llama), "special": [1, 2], "batch": len(tokens_CL), **places})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHONS[tool]), str(Path(__file__).with_name("eval_worker.py")), tool, str(tmp_path / "jobs.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    for model, (ours, each) in mine.items():
        compare(tool, ours, each, json.loads((tmp_path / model / "answer").read_text()))


def compare(tool: str, ours: dict[str, Any], each: dict[str, list[float]], theirs: dict[str, Any]) -> None:
    without, with_special = (
        {name: value for section in theirs[which]["metrics"].values() for name, value in section.items()}
        for which in ("without", "with")
    )
    figures, special = ours["sae_lens"], ours["with_special_tokens"]
    assert 0.05 < special["fvu_own_mean"] < 0.7  # else there is little to compare
    assert 0.2 < figures["ce_loss_score"] < 0.99
    assert figures["ce_loss_with_ablation"] > figures["ce_loss_without_sae"] + 1
    pairs = {name: (value, without[name]) for name, value in figures.items()}
    pairs |= {
        f"{name} with special tokens": (value, with_special[name])
        for name, value in (
            ("l0", special["l0"]),
            ("explained_variance", 1 - special["fvu_own_mean"]),
            ("cossim", special["cosine"]),
            ("l2_ratio", special["norm_ratio"]),
        )
    }
    if tool == "sae_bench":  # what it computes otherwise than sae-lens does today; docs/log.md
        pairs = {name: pair for name, pair in pairs.items() if not name.startswith(("explained_variance", "mse"))}
    far = {name: pair for name, pair in pairs.items() if abs(pair[0] - pair[1]) > WITHIN * abs(pair[1])}
    assert not far, pairs
    density_F = torch.tensor(theirs["without"]["features"]["feature_density"])
    assert torch.allclose(torch.tensor(each["density"]), density_F, atol=1e-3)
