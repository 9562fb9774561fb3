"""The errors that a user is meant to read: one line that names the field, its value and what would be right."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from os import PathLike


class SparsepilotError(Exception):
    """Base of every error raised on bad input. The entry points print its message alone, without a traceback."""


class ConfigError(SparsepilotError):
    """A configuration value that is wrong by itself or beside another one."""


class DataError(SparsepilotError):
    """An activation cache, a text source or a row of it that cannot be used."""


class CheckpointError(SparsepilotError):
    """A checkpoint or a saved autoencoder that cannot be loaded, or does not belong to this run."""


class NonFiniteError(SparsepilotError):
    """A loss or gradient that is NaN or infinite; the message names the step, the rows and the term."""


class RankError(SparsepilotError):
    """A run of several ranks that one of them has left."""


class SaidElsewhere(SparsepilotError):
    """An error that another rank of the run has found and printed; this one ends without a word."""


def cannot_write(path: str | PathLike[str], cause: OSError) -> CheckpointError:
    """What to raise where a file of a run could not be written.

    >>> print(cannot_write("run/last.ckpt", OSError(errno.ENOSPC, "No space left on device")))
    cannot write run/last.ckpt: the disk is full; checkpoints written before are whole, free some space and start again
    >>> print(cannot_write("run/last.ckpt", OSError(errno.ENOENT, "No such file or directory")))
    cannot write run/last.ckpt: No such file or directory; checkpoints that are still there are whole
    """
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = "the disk is full; checkpoints written before are whole, free some space and start again"
    else:
        what = f"{cause.strerror or cause}; checkpoints that are still there are whole"
    return CheckpointError(f"cannot write {path}: {what}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause to append to an error: the known names closest to `name`, or all of them when none is close.

    >>> nearest("model.layer.9", ["model.layers.9", "lm_head"])
    "did you mean 'model.layers.9'?"
    >>> nearest("zzz", ["relu", "topk"])
    'known: relu, topk'
    """
    options = list(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not options:
        return "there are none"
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f"known: {shown}"
