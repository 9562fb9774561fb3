"""How an entry point ends when the user's input is wrong: one line, no traceback, exit status 2."""

from __future__ import annotations

import contextlib
import errno
import glob
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsepilot import launch, ranks, slurm
from sparsepilot.config.resolvers import register_resolvers
from sparsepilot.config.schema import Config, register
from sparsepilot.config.sweeping import Record, conclude, led
from sparsepilot.errors import ConfigError, RankError, SaidElsewhere, SparsepilotError, nearest
from sparsepilot.process_memory import ask_for_huge_pages
from sparsepilot.run_folder import RunFolder
from sparsepilot.sweep_folder import place_here


def run(main: Callable[[], None], ranks_alike: bool = False) -> None:
    """Runs a `@hydra.main` function, whose own body is `with user_errors():`, or `with one_run(cfg):`.

    A rank that another process has started is given its configuration by it, and needs no Hydra.

    Args:
        main: the function.
        ranks_alike: the processes that srun or torchrun has started beside this one do the same as it does; of a
            mistake in what they were given one of them tells.
    """
    prepare(ranks_alike)
    with user_errors():
        given = launch.receive()
        if given is None:
            main()
            conclude(led)
        else:
            inspect.unwrap(main)(OmegaConf.merge(OmegaConf.structured(Config), given.config))


def prepare(ranks_alike: bool = False) -> None:
    """What a process needs before a configuration is composed or read; `run` sees to it."""
    if ranks_alike:
        ranks.may_say.append(_speaks_after_first)
        slurm.leave_during_start_up()
    ask_for_huge_pages()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand the exceptions to us instead of printing them
    register()
    register_resolvers()
    prepared.append(True)


prepared: list[bool] = []
"""Not empty once `prepare` was called."""


@contextlib.contextmanager
def one_run(cfg: DictConfig) -> Iterator[None]:
    """The body of train.py: a run by itself, or a member of a sweep, whose error does not stop the others (but for the
    other ranks of that member).

    A job that submitit has submitted begins here, behind `run`.
    """
    if not prepared:
        prepare(ranks_alike=True)
    place = place_here()
    if place is None:
        with user_errors():
            yield
        return
    if launch.handed is None and ranks.ranks_here() is not None and not slurm.by_submitit():
        with user_errors():
            raise ConfigError(
                "-m: this process is one of several that srun or torchrun has started, and a sweep is started by one; "
                "use hydra/launcher=slurm, or trainer=ddp, which starts its ranks itself"
            )
    record = Record(place)
    try:
        record.begin(cfg)
        yield
        record.done()
    except SystemExit as leaving:
        if leaving.code in (0, None):
            record.left()
        raise
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("SPARSEPILOT_TRACEBACK"):
            traceback.print_exc()
        line = line or " ".join(f"{type(error).__name__}: {error}".split())
        told = _is_mine_to_say(error, line)
        if record.failed(line, knows=told and not _is_secondhand(error)) and told:
            print(f"error: {line}", file=sys.stderr)
        if launch.handed is not None or ranks.ranks_here() is not None:  # or the other ranks would wait for this one
            raise SystemExit(2) from None


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that the user is meant to read into one line and exit status 2.

    Around the body of a job as well, because Hydra announces every other exception in words of its own.
    `SPARSEPILOT_TRACEBACK=1` shows where the error came from.
    """
    try:
        yield
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        if os.environ.get("SPARSEPILOT_TRACEBACK"):
            traceback.print_exc()
        if _is_mine_to_say(error, line):
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def _speaks_after_first(line: str) -> bool:
    if not ranks.is_first():
        slurm.end_when_told()
    return ranks.speaks_after_first(line)


def _is_mine_to_say(error: BaseException, line: str) -> bool:
    """Of an error that all ranks of a run meet, one of them tells."""
    told = next((e for e in _causes(error) if isinstance(e, SaidElsewhere | RankError)), None)
    if isinstance(told, SaidElsewhere) or (isinstance(told, RankError) and launch.is_watched()):
        return False
    return ranks.may_say[-1](line)


def _is_secondhand(error: BaseException) -> bool:
    """Whether it says no more than that another rank is in trouble."""
    return any(isinstance(cause, RankError) for cause in _causes(error))


def arguments(given: list[str], fields: dict[str, Any], lists: Collection[str] = ()) -> dict[str, Any]:
    """field=value arguments of a small script, without Hydra's groups; those of `lists` may be several names.

    Raises ConfigError for a field that is not in `fields` (name -> default, "???" where one is required).
    """
    cfg = OmegaConf.from_cli(given)
    for key in map(str, cfg):
        if key not in fields:
            raise ConfigError(f"{key} = {cfg[key]}: there is no such field; {nearest(key, fields)}")
        if key in TEXTS and not OmegaConf.is_missing(cfg, key):
            cfg[key] = _text(key, given, cfg[key], several=key in lists)
    merged = OmegaConf.merge(fields, cfg)
    for key in fields:
        if OmegaConf.is_missing(merged, key):
            raise ConfigError(f"{key}: missing; set {key}=...")
    return cast(dict[str, Any], OmegaConf.to_container(merged))


TEXTS = ("run_dir", "out", "cache", "format", "hook", "hook_out")
"""Fields of small scripts that name a folder or another thing, though the name may read as a number."""


def _text(field: str, given: list[str], value: Any, several: bool) -> Any:
    """A value as it was written; null stays null.

    Raises:
        ConfigError: where it is a list or an object, and one name is wanted.
    """
    if several and isinstance(value, ListConfig):
        return [str(each) for each in value]
    if isinstance(value, ListConfig | DictConfig):
        raise ConfigError(f"{field} = {value}: should be one name")
    if value is None or isinstance(value, str):
        return value
    return next(text for name, _, text in (one.partition("=") for one in reversed(given)) if name == field)


def one_line(error: BaseException) -> str | None:
    """The message that a user reads: what is wrong, where, and what would be right; None where the error is a bug."""
    ours = next((e for e in _causes(error) if isinstance(e, SparsepilotError)), None)
    if ours is not None:  # perhaps inside Hydra's report of a constructor that refused its arguments
        return " ".join(str(ours).split())
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: there is no conf/{error.missing_cfg_file}.yaml; {nearest(name, error.options)}"
    for cause in _causes(error):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return _omegaconf_line(cause)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return re.sub(r"\s*\n\s*", "; ", str(error).strip())
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; what was whole before still is"
    if isinstance(error, PermissionError):  # to read it or to write it, it does not say
        return f"no access to {error.filename or 'a file'}: {error.strerror}"
    return None


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # an error raised again while it was handled is its own cause
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _omegaconf_line(error: OmegaConfBaseException) -> str:
    key = str(error.full_key)
    first = str(error.msg or error).splitlines()[0]
    if unknown := re.match(r"Key '(.+)' (?:is not in struct|not in '.+')", first):
        parent: Any = error.parent_node
        known = [str(name) for name in parent] if parent is not None else []
        return f"{_with_value(key)}: there is no such field; {nearest(unknown[1], known)}"
    if wrong := re.match(r"Value '(.*?)' (?:of type '.+' )?could not be converted to (\w+)", first):
        whole = re.fullmatch(r"-?\d+\.0", wrong[1])  # 1e9 is a float to YAML
        meant = f"; write {float(wrong[1]):.0f}" if whole else ""
        return f"{key} = {wrong[1]!r}: should be {_ARTICLES.get(wrong[2], wrong[2])}{meant}"
    return f"{_with_value(key)}: {first}"


_ARTICLES = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "text"}


def _with_value(key: str) -> str:
    """`key = value` as it was given on the command line, `key` where it was not."""
    for argument in sys.argv[1:]:
        name, equals, value = argument.lstrip("+~").partition("=")
        if equals and name == key:
            return f"{key} = {value}"
    return key


def run_paths(given: Any) -> list[str]:
    """What `run_dir=a`, `run_dir=[a,b]` or `run_dir=sweep/*` names: wildcards stand for run folders.

    Raises:
        ConfigError: where nothing is named, or nothing matches.
    """
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    paths = [path for name in names for path in _matching(name)]
    if not paths:
        raise ConfigError("run_dir = []: at least one run is needed")
    return paths


def _matching(name: str) -> list[str]:
    if not glob.has_magic(name):
        return [name]
    found = [path for path in sorted(glob.glob(name)) if RunFolder(path).exists()]
    if not found:
        raise ConfigError(f"run_dir = {name}: no run folder (with a config.yaml) matches")
    return found
