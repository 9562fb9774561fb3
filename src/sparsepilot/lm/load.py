"""A causal language model and its tokenizer, from a Hugging Face id, a local folder or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsepilot.errors import ConfigError, DataError, nearest
from sparsepilot.lm import converted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGE_SCHEME = "pkg://"


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode with frozen weights, and what is needed to name it in a manifest."""

    model: Any = field(repr=False)
    """The transformers model; its dotted module paths are the site names."""
    tokenizer: Any = field(repr=False)
    id: str
    """The name the user gave: a hub id, a folder, or the label of a GGUF file."""
    revision: str
    """Hub commit, or `sha256:...` of the local files: two models with one revision have the same weights."""
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the embedding lies, hence where token ids must go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def load(
    id: str,
    *,
    gguf: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    install: str | None = None,
    keep_converted: bool = True,
) -> LanguageModel:
    """Loads a model and its tokenizer; only a hub id ever reaches for the network.

    `gguf` is a path, or `pkg://package/file` for a file inside an installed Python package, found without importing
    it; `id` is then only the label. `install` is the command to show when that package is missing. `dtype` is
    `float32`, `bfloat16`, or `auto`: bfloat16 where the device multiplies it in hardware, else float32. A GGUF file
    is unpacked once into a private folder (`keep_converted`, see `lm.converted`), as unpacking takes over ten seconds.

    Raises ConfigError for a wrong dtype or device, DataError for a model that is not there or cannot be read.
    """
    _require_transformers()
    torch_dtype = _dtype(dtype, device)
    with _quiet_transformers():
        if gguf is not None:
            path = _gguf_path(gguf, install)
            sha = sha256_of([path])
            model, tokenizer = _load_gguf(path, sha, torch_dtype, keep_converted)
            found_revision = f"sha256:{sha}"
        elif Path(id).expanduser().is_dir():
            folder = Path(id).expanduser()
            model, tokenizer = _from_pretrained(str(folder), torch_dtype, "lm.id", local_files_only=True)
            found_revision = f"sha256:{sha256_of(_model_files(folder))}"
        elif id.startswith((".", "/", "~")):
            raise DataError(f"lm.id={id!r}: no such folder; give a local model folder, a hub id or lm.gguf=<file>")
        else:
            model, tokenizer = _from_pretrained(id, torch_dtype, "lm.id", revision=revision)
            found_revision = getattr(model.config, "_commit_hash", None) or revision or "main"
    model.eval().requires_grad_(False)
    return LanguageModel(model.to(device), tokenizer, id, found_revision, torch_dtype)


def load_fields(fields: Mapping[str, Any]) -> LanguageModel:
    """`load` with fields from a file or a command line that nobody has looked at yet.

    Raises ConfigError, besides what `load` does, for a field that there is not, and where `id` is missing.
    """
    known = inspect.signature(load).parameters
    for name in fields:
        if name not in known:
            raise ConfigError(f"lm.{name} = {fields[name]}: there is no such field; {nearest(str(name), known)}")
    if not isinstance(fields.get("id"), str):
        raise ConfigError(
            f"lm.id = {fields.get('id')}: give the hub id, folder or label of the language model, lm.id=..."
        )
    return load(**fields)


def sha256_of(paths: list[Path]) -> str:
    """Hex SHA-256 over the names and contents of files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _load_gguf(path: Path, sha: str, dtype: torch.dtype, keep_converted: bool) -> tuple[Any, Any]:
    key = f"{sha[:24]}-{str(dtype).removeprefix('torch.')}"
    if keep_converted:
        folder = converted.find(key)
        if folder is not None:
            return _from_pretrained(str(folder), dtype, "lm.gguf", local_files_only=True)
    model, tokenizer = _unpack_gguf(path, dtype)
    if keep_converted:
        converted.keep(key, model, tokenizer)
    return model, tokenizer


def _unpack_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"lm.gguf={path.name}: the Python package {package!r} is missing: pip install {package}")
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        # The file's metadata takes seconds to parse: a configuration passed on is one parse less.
        config = transformers.AutoConfig.from_pretrained(str(path.parent), **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **options)
        if hasattr(transformers, "GgufConfig"):
            # Otherwise the weights may stay in 4-bit blocks, whose products are computed in float32.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), config=config, dtype=dtype, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"lm.gguf={path}: transformers cannot load this file: {_one_line(error)}") from error
    # From here on the model is an ordinary dense one, and may be saved like one.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _from_pretrained(name: str, dtype: torch.dtype, option: str, **options: Any) -> tuple[Any, Any]:
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(name, **options)  # apart from the tokenizer, to say which is missing
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{option}={name!r}: no tokenizer in {name}: save the model's own tokenizer beside it "
                f"(tokenizer.save_pretrained), or give a model that has one; transformers says: {_one_line(error)}"
            ) from error
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{option}={name!r}: transformers cannot load this model: {_one_line(error)}") from error
    return model, tokenizer


def _gguf_path(gguf: str, install: str | None) -> Path:
    if not gguf.startswith(PACKAGE_SCHEME):
        path = Path(gguf).expanduser().resolve()
        if not path.is_file():
            raise DataError(f"lm.gguf={gguf!r}: no such file")
        return path
    package, _, name = gguf.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        command = install or f"pip install {package.replace('_', '-')}"
        raise DataError(f"lm.gguf={gguf}: the Python package {package!r} is not installed: {command}")
    for folder in folders:
        path = Path(folder) / name
        if path.is_file():
            return path
    held = sorted(p.name for folder in folders for p in Path(folder).glob("*.gguf"))
    raise DataError(f"lm.gguf={gguf}: the package holds no file {name!r}; {nearest(name, held)}")


def _model_files(folder: Path) -> list[Path]:
    suffixes = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}
    return sorted(path for path in folder.iterdir() if path.suffix in suffixes)


def _dtype(dtype: str, device: str) -> torch.dtype:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"lm.device={device!r}: not a torch device; right are 'cpu', 'cuda', 'cuda:0'") from error
    if dtype == "auto":
        fast = kind == "cuda" or (kind == "cpu" and _cpu_multiplies_bfloat16())
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"lm.dtype={dtype!r}: right are 'auto', " + ", ".join(map(repr, DTYPES)))
    return DTYPES[dtype]


def _cpu_multiplies_bfloat16() -> bool:
    checks = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return any(check() for check in checks if check is not None)


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise DataError("lm: the package 'transformers' is missing: pip install -e '.[lm]'")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, which draw a line per tensor where no terminal is."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging

    bars_were_on = logging.is_progress_bar_enabled()
    legacy_tqdm = getattr(legacy, "tqdm", None)  # this one module draws its bar past the switch below
    logging.disable_progress_bar()
    if legacy_tqdm is not None:
        legacy.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        if legacy_tqdm is not None:
            legacy.tqdm = legacy_tqdm
        if bars_were_on:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
