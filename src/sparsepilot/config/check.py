"""All that can be wrong with a configuration before anything is built."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from sparsepilot.config.signature import check_fields, check_target
from sparsepilot.errors import ConfigError
from sparsepilot.lm import load as lm_load
from sparsepilot.lm import text as lm_text


def check(cfg: DictConfig) -> None:
    """Checks every field and the relations between groups.

    Raises:
        ConfigError: one line that names the field, its value and what would be right.
    """
    plain = _complete(cfg)
    _check_numbers(plain)
    check_target("model", plain["model"], given=("d_in",))
    check_target("controller", plain["controller"])
    check_target("optimizer", plain["optimizer"], given=("params",))
    check_target("schedule", plain["schedule"], given=("samples", "total_samples"))
    _check_data(plain)
    check_target("trainer", plain["trainer"], given=("callbacks", "logger", "max_epochs"))
    _check_relations(plain)


def check_cache(cfg: DictConfig) -> dict[str, Any]:
    """The same for `scripts/cache_activations.py`; returns the plain values.

    Raises:
        ConfigError: one line that names the field, its value and what would be right.
    """
    plain = _complete(cfg)
    _check_data(plain)
    if plain["data"].get("build") is None:
        raise ConfigError(
            "data.build = None: this data group does not say how to build its cache; use data=demo or data=lm"
        )
    return plain


def _complete(cfg: DictConfig) -> dict[str, Any]:
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        first = sorted(missing)[0]
        raise ConfigError(f"{first}: missing; set {first}=...")
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))


def _check_data(plain: dict[str, Any]) -> None:
    data = dict(plain["data"])
    build = data.pop("build", None)
    check_target("data", data, given=("batch", "accumulate", "total_samples", "seed"))
    if build is not None:
        from_lm = build["_target_"].endswith("build_from_lm")
        given = ("path", "sites", "lm", "text", "seed", "rank", "world", "console") if from_lm else ("path", "progress")
        check_target("data.build", build, given=given)
        if from_lm:
            check_fields("lm", plain["lm"], lm_load.load)
            check_fields("text", plain["text"], lm_text.documents)


def _check_numbers(plain: dict[str, Any]) -> None:
    for name in ("samples", "batch", "accumulate"):
        if plain[name] < 1:
            raise ConfigError(f"{name} = {plain[name]}: at least 1 is needed")
    if plain["threads"] is not None and plain["threads"] < 1:
        raise ConfigError(f"threads = {plain['threads']}: at least 1 is needed, or null for torch's own choice")
    if plain["clip_norm"] is not None and plain["clip_norm"] <= 0:
        raise ConfigError(f"clip_norm = {plain['clip_norm']}: a positive norm is needed, or null for no clipping")
    if plain["optimizer"].get("lr") is not None and plain["optimizer"]["lr"] <= 0:
        raise ConfigError(f"optimizer.lr = {plain['optimizer']['lr']}: a positive learning rate is needed")
    callbacks = plain["callbacks"]
    for name in ("log_every_steps", "validate_every_samples", "checkpoint_every_samples", "keep_last"):
        if callbacks[name] is not None and callbacks[name] < 1:
            raise ConfigError(f"callbacks.{name} = {callbacks[name]}: at least 1 is needed")
    if callbacks["checkpoint_every_minutes"] <= 0:
        raise ConfigError(
            f"callbacks.checkpoint_every_minutes = {callbacks['checkpoint_every_minutes']}: a positive time is needed"
        )


def _check_relations(plain: dict[str, Any]) -> None:
    model, batch, accumulate = plain["model"], plain["batch"], plain["accumulate"]
    streams = plain["data"].get("num_streams", 64)
    if model.get("k") is not None and model.get("d_sae") is not None and model["k"] > model["d_sae"]:
        raise ConfigError(f"model.k = {model['k']}: at most model.d_sae = {model['d_sae']} latents can be active")
    if model.get("aux_k") is not None and model["aux_k"] > model["d_sae"]:
        raise ConfigError(f"model.aux_k = {model['aux_k']}: at most model.d_sae = {model['d_sae']}")
    if batch % (streams * accumulate):
        unit = streams * accumulate
        below, above = batch // unit * unit, -(-batch // unit) * unit
        right = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch = {batch}: must be a multiple of data.num_streams x accumulate = {streams} x {accumulate}, "
            f"e.g. {right}"
        )
    if plain["samples"] < batch:
        raise ConfigError(f"samples = {plain['samples']}: the budget is less than one batch of {batch}")
