"""circuit-tracer: a set of transcoders, layer_<i>.safetensors, or a cross-layer one, W_enc_<i> and W_dec_<i>.

Checked against the sources of circuit-tracer 0.5. Encoders read x, ReLU or JumpReLU. A set has one file per layer, all
of one width, from layer 0 on; a cross-layer decoder is [d_transcoder, layers that it writes, d_model].
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepilot.errors import CheckpointError, ConfigError
from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.files import read_safetensors, write_safetensors
from sparsepilot.interop.formats.refuse import Holds, Names, Written, check_held, places_of, sites_of
from sparsepilot.interop.names import Place, model_of, place_of
from sparsepilot.run_folder import write_json

CONFIG = "config.yaml"
_THRESHOLDED = ("relu", "jumprelu", "batchtopk")
HOLDS: Holds = {
    "transcoder": _THRESHOLDED,
    "skip_transcoder": _THRESHOLDED,
    "cross_layer_transcoder": _THRESHOLDED,
}
_WHY_NOT = "it replaces what an MLP does, from its input to its output"
REASONS = {
    "autoencoder": _WHY_NOT,
    "crosscoder": _WHY_NOT,
    "topk": "its loader knows ReLU and thresholds",
    "gated": "its loader knows ReLU and thresholds",
}
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"


def files(names: set[str], file: str | None) -> list[str]:
    """The files to read in a folder that is of this format; empty for another one.

    Raises:
        CheckpointError: when it holds transcoders of several layers and none is named.
    """
    config = [CONFIG] if CONFIG in names else []
    if file is not None and _LAYER.fullmatch(file):
        return [file, *config]
    layers = sum(re.fullmatch(r"W_enc_\d+\.safetensors", name) is not None for name in names)
    if layers:
        return [f"W_{side}_{i}.safetensors" for side in ("enc", "dec") for i in range(layers)] + config
    single = sorted(name for name in names if _LAYER.fullmatch(name))
    if len(single) > 1:
        raise CheckpointError(f"a set of {len(single)} transcoders; name one of them, e.g. {single[0]}")
    return single + config if single else []


def write(sae: Dictionary, folder: Path, names: Names) -> Written:
    """Writes the tensors of a transcoder or a cross-layer transcoder, and config.yaml.

    Raises:
        ConfigError: when the format cannot hold the dictionary, or the tool has no name for its sites.
    """
    check_held("circuit_tracer", HOLDS, REASONS, sae)
    if sae.cfg["blocks"] == "transcoder":
        return write_set([sae], folder, names)
    cfg, tensors = sae.cfg, sae.tensors()
    layers, width = cfg["layers"], cfg["d_in"] // cfg["layers"]
    if cfg["d_out"] != cfg["d_in"] or len(set(cfg.get("widths_out") or [width])) > 1:
        raise ConfigError(
            "format = circuit_tracer: a cross-layer transcoder there reads and writes layers of one width"
        )
    hook_in, hook_out, order = _layer_hooks(cfg, names)
    per_layer = cfg["d_sae"] // layers
    for i in range(layers):
        own = slice(i * per_layer, (i + 1) * per_layer)
        if bool(tensors["W_dec"][own, : i * width].any()):
            raise ConfigError(f"format = circuit_tracer: latents that read layer {i} write earlier layers, too")
        encoder = {
            f"W_enc_{i}": tensors["W_enc"][:, own].T,
            f"b_enc_{i}": tensors["b_enc"][own],
            f"b_dec_{i}": tensors["b_dec"][i * width : (i + 1) * width],
        }
        if "threshold" in tensors:
            encoder[f"threshold_{i}"] = tensors["threshold"][own]
        decoder = tensors["W_dec"][own, i * width :].reshape(per_layer, layers - i, width)
        write_safetensors(folder / f"W_enc_{i}.safetensors", encoder)
        write_safetensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": decoder})
    _write_config(folder, "cross_layer_transcoder", cfg, hook_in, hook_out)
    how = "from circuit_tracer.transcoder.cross_layer_transcoder import load_clt\n"
    how += f'clt = load_clt("{{folder}}", "{hook_in}", "{hook_out}", lazy_decoder=False, dtype=torch.float32)'
    return Written("", how, _note(order))


def write_set(saes: list[Dictionary], folder: Path, names: Names) -> Written:
    """Writes one transcoder per layer, and config.yaml.

    Raises:
        ConfigError: when the format cannot hold one of them, two are of one layer, or they do not suit each other.
    """
    layers, hooks = [], set()
    for sae in saes:
        check_held("circuit_tracer", HOLDS, REASONS, sae)
        if sae.cfg["blocks"] != "transcoder":
            raise ConfigError("run_dir: a set is made of transcoders of one layer each; this one is a cross-layer one")
        if sae.cfg["d_in"] != sae.cfg["d_out"]:
            raise ConfigError(
                f"format = circuit_tracer: cannot hold a transcoder from {sae.cfg['d_in']} to {sae.cfg['d_out']} "
                "columns; one width only"
            )
        read, write = _places(sae.cfg, names)
        layers.append(read.layer)
        hooks.add((read.hook, write.hook))
    shapes = {(sae.cfg["d_in"], sae.cfg["d_sae"], bool(sae.cfg.get("skip"))) for sae in saes}
    if len(set(layers)) < len(layers) or len(hooks) > 1 or len(shapes) > 1:
        raise ConfigError(
            "run_dir: the transcoders of a set need a layer each, and one kind of site, width, d_sae and skip for all; "
            f"these are of layers {layers}, sites {sorted(hooks)}, widths, d_sae and skip {sorted(shapes)}"
        )
    for sae, layer in zip(saes, layers, strict=True):
        tensors = sae.tensors()
        tensors["W_enc"] = tensors["W_enc"].T
        if "threshold" in tensors:
            tensors[_THRESHOLD] = tensors.pop("threshold")
        write_safetensors(folder / f"layer_{layer}.safetensors", tensors)
    (hook_in, hook_out) = hooks.pop()
    _write_config(folder, "transcoder_set", saes[0].cfg, hook_in, hook_out)
    paths = ", ".join(f'"{{folder}}/layer_{i}.safetensors"' for i in sorted(layers))
    how = "from circuit_tracer.transcoder import load_transcoder_set\n"
    how += f'transcoders = load_transcoder_set(dict(enumerate([{paths}])), "", "{hook_in}", "{hook_out}")'
    return Written("", how, _note(sorted(layers)))


def _places(cfg: dict[str, Any], names: Names) -> tuple[Place, Place]:
    read, write = places_of(cfg)
    for option, name in zip(names._fields, names, strict=True):
        place = None if name is None else place_of(name)
        if name is not None and place is None:
            raise ConfigError(
                f"{option} = {name}: is no hook of a layer; give one as TransformerLens calls it, "
                "blocks.<layer>.hook_... or blocks.<layer>.mlp.hook_..."
            )
        read, write = (place or read, write) if option == "hook" else (read, place or write)
    if read is None or write is None or read.layer != write.layer:
        raise ConfigError(
            f"format = circuit_tracer: from {sites_of(cfg)[0]!r} to {sites_of(cfg)[1]!r} are not two hooks of one "
            "layer that we know of; name them: hook=blocks.<layer>.mlp.hook_in hook_out=blocks.<layer>.hook_mlp_out"
        )
    return read, write


def _layer_hooks(cfg: dict[str, Any], names: Names) -> tuple[str, str, list[int]]:
    """Hooks within a layer that all sites of a cross-layer transcoder share, and the layers in order."""
    sides = []
    for field, given in (("sites", names.hook), ("sites_out", names.hook_out)):
        sites = cfg.get(field) or []
        places = [place_of(site, model_of(cfg)) for site in sites]
        hooks = {place.hook if place else None for place in places}
        layers = [place.layer for place in places if place]
        if given is not None and not re.fullmatch(r"(?:\w+\.)*hook_\w+", given):
            hooks = {None}
        elif given is not None:
            hooks, layers = {given}, layers or list(range(cfg["layers"]))
        if len(hooks) != 1 or None in hooks or layers != sorted(set(layers)) or len(layers) != cfg["layers"]:
            raise ConfigError(
                f"format = circuit_tracer: {field} {sites} are not one hook of ascending layers that we know of; name "
                "it: hook=mlp.hook_in hook_out=hook_mlp_out"
            )
        sides.append((str(hooks.pop()), layers))
    return sides[0][0], sides[1][0], sides[0][1]


def _note(layers: list[int]) -> tuple[str, ...]:
    if layers == list(range(len(layers))):
        return ()
    return (f"the tool wants every layer of the model from 0 on; these are {', '.join(map(str, layers))}",)


def _write_config(folder: Path, kind: str, cfg: dict[str, Any], hook_in: str, hook_out: str) -> None:
    # JSON is YAML, too
    names = {"model_name": model_of(cfg), "model_kind": kind}
    write_json(folder / CONFIG, {**names, "feature_input_hook": hook_in, "feature_output_hook": hook_out})


def read(folder: Path, file: str | None) -> Dictionary:
    """Reads a transcoder (of a set: the one that `file` names) or a cross-layer transcoder.

    Raises:
        CheckpointError: when a file is missing, damaged or has tensors of the wrong shape.
    """
    config = _read_config(folder / CONFIG)
    names = sorted(path.name for path in folder.iterdir())
    found = files(set(names), file)[0]
    cfg: dict[str, Any] = {"imported": {"format": "circuit_tracer"}, "source": {"model_id": config.get("model_name")}}
    hooks = [config.get(f"feature_{side}_hook") for side in ("input", "output")]
    if layer := _LAYER.fullmatch(found):
        tensors, numbers = read_safetensors(folder / found), [int(layer[1])]
        if "W_enc" in tensors:
            tensors["W_enc"] = tensors["W_enc"].T
        if _THRESHOLD in tensors:
            tensors["threshold"] = tensors.pop(_THRESHOLD)
        sizes = {name: tensors[key].numel() for name, key in (("d_sae", "b_enc"), ("d_out", "b_dec")) if key in tensors}
        cfg |= {"blocks": "transcoder", "skip": "W_skip" in tensors, "layers": 1, "d_in": sizes.get("d_out"), **sizes}
        where = folder / found
    else:
        numbers = list(range(sum(name.startswith("W_enc_") for name in names)))
        tensors, where = _read_cross_layer(folder, len(numbers)), folder / found
        cfg |= {"blocks": "cross_layer_transcoder", "skip": False, "layers": len(numbers)}
        cfg |= {"d_in": tensors["b_dec"].numel(), "d_out": tensors["b_dec"].numel(), "d_sae": tensors["b_enc"].numel()}
    cfg["architecture"] = "jumprelu" if "threshold" in tensors else "relu"
    for field, hook in zip(("sites", "sites_out"), hooks, strict=True):
        cfg[field] = [f"blocks.{i}.{hook}" for i in numbers] if isinstance(hook, str) else None
    return build(cfg, tensors, where)


def _read_cross_layer(folder: Path, layers: int) -> dict[str, Tensor]:
    """W_enc [d_model, layers * F], W_dec [layers * F, layers * d_model] with zeros where nothing is written."""
    parts: dict[str, list[Tensor]] = {"W_enc": [], "b_enc": [], "b_dec": [], "W_dec": [], "threshold": []}
    for i in range(layers):
        for side in ("enc", "dec"):
            path = folder / f"W_{side}_{i}.safetensors"
            for name, tensor in read_safetensors(path).items():
                short = name.removesuffix(f"_{i}")
                if short not in parts:
                    raise CheckpointError(f"{path}: holds {name}, which is no tensor of layer {i}")
                parts[short].append(tensor.float())
    first = parts["W_enc"][0] if parts["W_enc"] else torch.empty(0)
    per_layer, width = first.shape if first.ndim == 2 else (0, 0)
    for name, want in {
        "W_enc": (per_layer, width),
        "b_enc": (per_layer,),
        "b_dec": (width,),
        "threshold": (per_layer,),
    }.items():
        shapes = {tuple(tensor.shape) for tensor in parts[name]}
        if (len(parts[name]) != layers and not (name == "threshold" and not parts[name])) or shapes - {want}:
            raise CheckpointError(
                f"{folder}: {name}_<i> of {layers} layers have shapes {sorted(shapes)}, not all {want}"
            )
    W_dec = torch.zeros(layers * per_layer, layers * width)
    for i, part in enumerate(parts["W_dec"]):
        want = (per_layer, layers - i, width)
        if tuple(part.shape) != want:
            raise CheckpointError(f"{folder}: W_dec_{i} has shape {list(part.shape)}, {list(want)} is needed")
        W_dec[i * per_layer : (i + 1) * per_layer, i * width :] = part.flatten(1)
    tensors = {"W_enc": torch.cat(parts["W_enc"]).T, "W_dec": W_dec}
    return tensors | {name: torch.cat(parts[name]) for name in ("b_enc", "b_dec", "threshold") if parts[name]}


def _read_config(path: Path) -> dict[str, Any]:
    """What config.yaml says; it names things only, so that without PyYAML they stay unnamed."""
    if not path.is_file():
        return {}
    try:
        yaml = import_module("yaml")
    except ImportError:
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({' '.join(str(error).split())[:200]})") from error
    return found if isinstance(found, dict) else {}
