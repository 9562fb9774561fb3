from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsepilot.errors import ConfigError, DataError
from sparsepilot.lm.text import describe, documents


def test_files_are_documents_and_copies_and_blanks_are_not(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "copy.txt").write_text("first\n")
    (tmp_path / "blank.txt").write_text(" \n")
    lines = [{"body": "third"}, {"body": "second"}, {"body": "fourth"}]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = list(documents("files", paths=[f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl"], field="body"))
    assert [d.text for d in found] == ["first", "second", "third", "fourth"]
    assert found[3].id == f"{tmp_path}/c.jsonl:5"
    assert list(documents("files", paths=[f"{tmp_path}/*.txt"], max_documents=1)) == found[:1]
    assert describe("files", paths=("x",), field="body") == {"source": "files", "paths": ["x"], "field": "body"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"  \n", "every document is empty"),
        ("x.txt", b"ab\xff", r"x.txt is not UTF-8 text \(byte 2\)"),
        ("x.jsonl", b'{"text": "a"}\n{oops', "line 2 is not JSON"),
        ("x.jsonl", b'{"texts": "a"}', r"text.field='text': .* line 1 has no such text; did you mean 'texts'"),
        ("y.txt", b"a", "no file matches"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(documents("files", paths=[f"{tmp_path}/x.*"]))
    assert "\n" not in str(caught.value)


def test_unknown_and_incomplete_sources() -> None:
    with pytest.raises(ConfigError, match=r"text.source='file': did you mean 'files'"):
        documents("file")
    with pytest.raises(DataError, match=r"text.paths=\[\]"):
        list(documents("files"))
    with pytest.raises(ConfigError, match=r"text.max_documents=0"):
        documents("python_docs", max_documents=0)
    with pytest.raises(ConfigError, match=r"text.name=null"):
        list(documents("hf_dataset"))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_dataset_without_the_library_names_the_command() -> None:
    with pytest.raises(DataError, match=r"pip install -e '.\[hub\]'"):
        list(documents("hf_dataset", name="x/y"))


LIST_PYTHON_DOCS = """
import hashlib, sys
from sparsepilot.lm.text import documents
before = set(sys.modules)
found = list(documents("python_docs"))
assert not {"turtle", "antigravity", "this", "idlelib"} & (set(sys.modules) - before)
print(len(found), hashlib.sha256(repr(found).encode()).hexdigest())
print([d.id for d in found if d.id in ("topic:assert", "module:json.decoder")])
text = next(d.text for d in found if d.id == "module:json.decoder")
print("json.decoder.JSONDecoder.raw_decode\\n\\nDecode a JSON document from" in text)
"""


def test_python_docs_do_not_depend_on_the_hash_seed_and_import_nothing() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", LIST_PYTHON_DOCS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    first, names, decoder = outputs.pop().splitlines()
    assert int(first.split()[0]) > 300
    assert names == "['topic:assert', 'module:json.decoder']"
    assert decoder == "True"
