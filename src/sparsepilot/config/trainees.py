"""Several dictionaries in one run: of each, the configuration of the run that would train it alone."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from sparsepilot.errors import ConfigError, SparsepilotError, nearest

ALONE = "sae"
"""What the one trainee of a run is called that names none."""
FIELDS = ("model", "controller", "optimizer", "seed", "cross_entropy")
"""What a trainee may have of its own; everything else belongs to the stream of rows that all of them see."""
TAKEN = ("train", "val", "controller", "frontier", "checkpoints", "report", "features", "wandb", "csv", "tensorboard")
"""Names that have a meaning in a row's keys or in a run folder."""


def each_alone(cfg: DictConfig) -> dict[str, DictConfig]:
    """Name -> configuration of the run alone: `cfg` itself under "sae", or with each of its `trainees` laid over it.

    A mapping of a trainee is laid over the run's own, field by field; one with a `_target_` (a group's option, chosen
    for this trainee) stands whole in its place, so that no field of another class is left behind.

    Raises:
        ConfigError: naming the field, where `trainees` cannot be.
    """
    overrides = OmegaConf.to_container(cfg, resolve=False).get("trainees")  # type: ignore[union-attr]
    if not overrides:
        return {ALONE: cfg}
    _check_names(overrides)
    alone = {}
    for name, own in overrides.items():
        _check_fields(name, own)
        alone[name] = copy.deepcopy(cfg)
        with open_dict(alone[name]):
            alone[name].trainees = None
            alone[name].run_dir = f"{cfg.run_dir}/{name}"
            base = cast(dict[str, Any], OmegaConf.to_container(alone[name], resolve=False))
            for field, value in own.items():
                try:
                    alone[name][field] = laid_over(base[field], value)
                except OmegaConfBaseException as error:  # seed is typed
                    raise ConfigError(f"trainees.{name}.{field} = {value}: should be an integer") from error
    return alone


def put_in_order(cfg: DictConfig, names: Sequence[str]) -> None:
    """Gives the trainees of `cfg` the order of `names`, which are theirs: an optimizer's state is restored by place."""
    own = cast(dict[str, Any], OmegaConf.to_container(cfg.trainees, resolve=False))
    cfg.trainees = {name: own[name] for name in names}


def laid_over(base: Any, own: Any) -> Any:
    """`own` over `base`: mappings field by field, unless `own` says which class it is for.

    >>> laid_over({"_target_": "TopK", "k": 8, "revival": {"_target_": "AuxK", "aux_k": 3}}, {"k": 4})
    {'_target_': 'TopK', 'k': 4, 'revival': {'_target_': 'AuxK', 'aux_k': 3}}
    >>> laid_over({"k": 8, "revival": {"_target_": "AuxK", "aux_k": 3}}, {"revival": {"_target_": "NoRevival"}})
    {'k': 8, 'revival': {'_target_': 'NoRevival'}}
    """
    if not isinstance(own, dict) or not isinstance(base, dict) or "_target_" in own:
        return own
    return {**base, **{field: laid_over(base.get(field), value) for field, value in own.items()}}


@contextlib.contextmanager
def naming(cfg: DictConfig, name: str) -> Iterator[None]:
    """What is wrong with one of several trainees is said of that one: `trainees.narrow.model.k = ...`."""
    try:
        yield
    except SparsepilotError as error:
        if not cfg.trainees:
            raise
        own = OmegaConf.to_container(cfg.trainees[name], resolve=False)
        raise type(error)(_of_trainee(str(error), name, own)) from error


def _of_trainee(message: str, name: str, own: Any) -> str:
    """The message with the trainee's name before the field, where the trainee sets it; else before the whole.

    >>> _of_trainee("model.k = 9: at most 8", "a", {"model": {"k": 9}})
    'trainees.a.model.k = 9: at most 8'
    >>> _of_trainee("model.k = 9: at most 8", "a", {"model": {"d_sae": 8}})
    'trainees.a: model.k = 9: at most 8'
    >>> _of_trainee("batch = 9: must be even", "a", {})
    'batch = 9: must be even'
    """
    begin = re.match(r"\w+(\.\w+)*", message)
    path = begin[0].split(".") if begin else [""]
    if path[0] not in FIELDS:
        return message
    for part in path:
        if not isinstance(own, dict) or part not in own:
            return f"trainees.{name}: {message}"
        own = own[part]
        if isinstance(own, dict) and "_target_" in own:
            break
    return f"trainees.{name}.{message}"


def _check_names(trainees: Any) -> None:
    if not isinstance(trainees, dict):
        raise ConfigError(
            f"trainees = {trainees}: a mapping is needed, of names to what is each one's own: "
            "{a: {model: {k: 16}}, b: {model: {k: 64}}}"
        )
    if len(trainees) == 1:
        raise ConfigError(
            f"trainees = {trainees}: two or more are needed; for one dictionary set model.* and controller.*"
        )
    for name in trainees:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ConfigError(f"trainees.{name}: a name is made of letters, digits, _ and -, a letter first")
        if name in TAKEN or hasattr(nn.ModuleDict(), name):
            raise ConfigError(f"trainees.{name}: this name is taken; choose another")


def _check_fields(name: str, own: Any) -> None:
    if not isinstance(own, dict):
        raise ConfigError(f"trainees.{name} = {own}: a mapping is needed, of some of {', '.join(FIELDS)}")
    for field, value in own.items():
        if field not in FIELDS:
            raise ConfigError(
                f"trainees.{name}.{field} = {value}: all trainees share it; a trainee has its own "
                f"{', '.join(FIELDS)}; {nearest(str(field), FIELDS)}"
            )
        if field in ("model", "controller") and not isinstance(value, dict):
            raise ConfigError(f"trainees.{name}.{field} = {value}: a mapping of its fields is needed")
    optimizer = own.get("optimizer", {})
    if not isinstance(optimizer, Mapping) or set(optimizer) - {"lr"}:
        raise ConfigError(f"trainees.{name}.optimizer = {optimizer}: trainees share an optimizer, but for its lr")
    if own.get("cross_entropy") is not None:
        raise ConfigError(
            f"trainees.{name}.cross_entropy = {own['cross_entropy']}: is measured as the run says; null leaves it out"
        )
