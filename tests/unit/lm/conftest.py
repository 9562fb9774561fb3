"""A Llama of four layers with random weights and a tokenizer that knows a few words, saved to a folder once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the [lm] extra is not installed")

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


def make_documents(num: int) -> list[Document]:
    """Document i is i + 1 words long and made of words that differ from its neighbours'."""
    return [Document(f"doc{i}", " ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(i + 1))) for i in range(num)]


@pytest.fixture(scope="session")
def packed(lm: LanguageModel) -> Packed:
    return pack(lm.tokenizer, make_documents(40), context_length=16, val_fraction=0.25)
