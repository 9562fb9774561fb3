"""Documents to run a language model over: Python's own documentation, files, or a Hugging Face dataset."""

from __future__ import annotations

import ast
import contextlib
import glob
import hashlib
import importlib
import importlib.util
import inspect
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsepilot.errors import ConfigError, DataError, nearest

# Tests, vendored or generated code, and texts that repeat one another.
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "encodings"}
_SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "lib-dynload", "pydoc_data", "__pycache__", "__phello__"}
_SKIPPED_FILES = {"antigravity", "this"}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


STREAMED = ("hf_dataset",)
"""Sources that may be too long to read to their end, and come shuffled already."""


class Document(NamedTuple):
    """A text and a name for it that is unique within its source."""

    id: str
    text: str


def documents(
    source: str,
    *,
    paths: Sequence[str] = (),
    field: str = "text",
    name: str | None = None,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    shuffle_buffer: int = 10_000,
    max_documents: int | None = None,
    seed: int = 0,
) -> Iterator[Document]:
    """Documents of a source, in a fixed order; empty ones and exact copies of earlier ones are left out.

    `python_docs`: the topics of `pydoc_data` and the docstrings of each standard-library module, read from source
    text without importing it. `files`: text files and JSON lines (`.jsonl`, text under `field`) by glob `paths`; a
    text file is one document. `hf_dataset`: the Hugging Face dataset `name`, streamed, shuffled within
    `shuffle_buffer` documents. `max_documents` ends any source early, as packing holds all it is given in memory.
    Raises DataError where a source is missing, malformed or has no text.
    """
    if source == "python_docs":
        found = _python_docs()
    elif source == "files":
        found = _files(paths, field)
    elif source == "hf_dataset":
        found = _hf_dataset(name, subset, split, revision, field, shuffle_buffer, seed)
    else:
        raise ConfigError(f"text.source={source!r}: {nearest(source, ['python_docs', 'files', 'hf_dataset'])}")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"text.max_documents={max_documents}: right is null or at least 1")
    return islice(_distinct(found, source), max_documents)


def describe(source: str, **fields: Any) -> dict[str, Any]:
    """JSON values that name a text source in a manifest: its fields and, for Python's documentation, the version."""
    known: dict[str, Any] = {"source": source, **fields}
    if source == "python_docs":
        known["python"] = platform.python_version()
    return {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in known.items()}


def _distinct(found: Iterator[Document], source: str) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in found:
        digest = hashlib.blake2b(document.text.strip().encode("utf-8", "replace"), digest_size=16).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            yield document
    if not seen:
        raise DataError(f"text.source={source}: every document is empty; at least one with text is needed")


def _python_docs() -> Iterator[Document]:
    topics: dict[str, str] = {}
    with contextlib.suppress(ImportError):  # some distributions ship Python without its documentation
        topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield Document(f"topic:{topic}", topics[topic])
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        skipped = parts[-1] in _SKIPPED_FILES or parts[-1].startswith("_sysconfigdata")
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not skipped:
            module = ".".join(parts).removesuffix(".__init__")
            text = "\n\n".join(_docstrings(path, module))
            if text:
                yield Document(f"module:{module}", text)


def _docstrings(path: Path, module: str) -> Iterator[str]:
    """Each docstring below the dotted name of what it documents, in source order."""
    try:
        with warnings.catch_warnings():
            # Odd escapes in somebody else's source are not this run's concern.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, (ast.Module, *_DEFINITIONS)):
            # Cleaned here, because Python 3.13 and later do it while compiling and earlier ones do not.
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if text:
                yield f"{name}\n\n{text}"
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, _DEFINITIONS):
                stack.append((f"{name}.{child.name}", child))
            elif isinstance(child, (ast.stmt, ast.ExceptHandler)):
                stack.append((name, child))


def _files(paths: Sequence[str], field: str) -> Iterator[Document]:
    if isinstance(paths, str):
        paths = [paths]
    for pattern in paths:
        hits = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        files = [Path(hit) for hit in hits if Path(hit).is_file()]
        if not files:
            raise DataError(f"text.paths={pattern!r}: no file matches")
        for path in files:
            yield from _jsonl(path, field) if path.suffix in (".jsonl", ".ndjson") else _text(path)
    if not paths:
        raise DataError("text.paths=[]: give at least one glob, such as text.paths=['books/*.txt']")


def _text(path: Path) -> Iterator[Document]:
    try:
        yield Document(str(path), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"text.paths: {path} is not UTF-8 text (byte {error.start})") from error


def _jsonl(path: Path, field: str) -> Iterator[Document]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"text.paths: {path} line {number} is not JSON: {error}") from error
            yield Document(f"{path}:{number}", _text_field(row, field, f"{path} line {number}"))


def _text_field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        keys = list(row) if isinstance(row, dict) else []
        raise DataError(f"text.field={field!r}: {where} has no such text; {nearest(field, keys)}")
    text: str = row[field]
    return text


def _hf_dataset(
    name: str | None, subset: str | None, split: str, revision: str | None, field: str, buffer: int, seed: int
) -> Iterator[Document]:
    if not name:
        raise ConfigError("text.name=null: name a dataset, such as text.name=roneneldan/TinyStories")
    if importlib.util.find_spec("datasets") is None:
        raise DataError("text=hf_dataset: the package 'datasets' is missing: pip install -e '.[hub]'")
    import datasets

    try:
        stream = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
    except Exception as error:  # the library raises its own, OSError and ValueError alike
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"text.name={name!r}: datasets cannot open this dataset: {reason}") from error
    if buffer > 1:
        stream = stream.shuffle(seed=seed, buffer_size=buffer)
    for index, row in enumerate(stream):
        yield Document(f"{name}:{index}", _text_field(row, field, f"row {index} of {name}"))
