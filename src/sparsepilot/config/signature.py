"""A group's schema is the signature of what it builds: one place to write a field, its type and its range."""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from sparsepilot.errors import ConfigError, nearest

HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def check_target(group: str, node: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Checks a node with a `_target_` as `check_fields` does.

    Raises ConfigError when the target cannot be imported, too.
    """
    check_mapping(group, node)
    name = node.get("_target_")
    if not isinstance(name, str):
        raise ConfigError(f"{group}._target_ = {name!r}: the dotted name of a class or a function is needed")
    try:
        target = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{group}._target_ = {name!r}: cannot be imported ({error})") from error
    check_fields(group, node, target, given)


def check_mapping(group: str, node: Any, instead: str = "") -> None:
    """Raises ConfigError where a group is no mapping of fields; `instead` says what else may be meant."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{group} = {node!r}: a mapping of its fields is needed{instead and '; ' + instead}")


def takes(node: Mapping[str, Any], *names: str) -> list[str]:
    """Which of these parameters the `_target_` of a node has."""
    return [name for name in names if name in inspect.signature(pkgutil.resolve_name(node["_target_"])).parameters]


def check_fields(group: str, node: Mapping[str, Any], target: Callable[..., Any], given: Collection[str] = ()) -> None:
    """Checks names, types and ranges of a group against the parameters of `target`.

    Args:
        group: dotted name, for the message.
        node: the group's plain values.
        target: the class or function that will take them.
        given: parameters that the code supplies, which a configuration must not set.

    Raises:
        ConfigError: on the first field that is unknown, missing, of the wrong type or out of range.
    """
    check_mapping(group, node)
    parameters = {name: p for name, p in inspect.signature(target).parameters.items() if name not in ("self", *given)}
    hints = _hints(target)
    shared = {name: hint for name, hint in _unpacked(parameters, hints).items() if name not in given}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not shared
    hints |= shared
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        if key not in parameters and key not in shared:
            if takes_any:
                continue
            known = [*(n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD), *shared]
            raise ConfigError(f"{group}.{key} = {value!r}: there is no such field; {nearest(key, known)}")
        if isinstance(value, Mapping) and "_target_" in value:
            check_target(f"{group}.{key}", value)
            continue
        _check_value(f"{group}.{key}", value, hints.get(key, Any))
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if required and key not in node and not node.get("_partial_"):
            raise ConfigError(f"{group}.{key}: missing; set {group}.{key}=...")


def _unpacked(parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `**common: Unpack[SomeTypedDict]`, with their types."""
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and get_origin(hints.get(name)) is Unpack:
            return get_type_hints(get_args(hints[name])[0], include_extras=True)
    return {}


def _check_value(name: str, value: Any, hint: Any) -> None:
    if value == "???":
        raise ConfigError(f"{name}: missing; set {name}=...")
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, TypeError):
        return  # a type of somebody else's that pydantic cannot read: its owner will check it
    except Exception as error:
        if type(error).__name__ != "PydanticUserError":  # the adapter takes no config where the type brings its own
            raise
        adapter = TypeAdapter(hint)
    try:
        _validate(adapter, value)
    except ValidationError as error:
        raise ConfigError(f"{name} = {value!r}: {_rule(adapter, value, error)}") from error


def _validate(adapter: TypeAdapter[Any], value: Any) -> None:
    """Strictly, as the value is handed on as it is: 8.0 would pass for an integer, and be a float where it is used.

    A list may stand for a tuple, which YAML does not have; numbers widen: 1 may stand for 1.0.
    """
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        if not isinstance(value, list) or all(found["type"] != "tuple_type" for found in error.errors()):
            raise
        adapter.validate_python(tuple(value), strict=True)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return {}


def _rule(adapter: TypeAdapter[Any], value: Any, error: ValidationError) -> str:
    """pydantic's sentence as the end of ours: 'Input should be greater than 0' -> 'should be greater than 0'."""
    if isinstance(value, float) and value.is_integer():  # 16e3 is a float to YAML
        with contextlib.suppress(ValidationError):
            adapter.validate_python(int(value), strict=True)
            return f"should be a valid integer; write {int(value)}"
    return error.errors()[0]["msg"].removeprefix("Input ").removeprefix("Value error, ")
