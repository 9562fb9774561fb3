"""How the named tuples of the laws go through a state dict, which holds numbers and lists of them."""

from __future__ import annotations

from typing import Any


def as_lists(value: Any) -> Any:
    """Tuples, within each other, too, as a state dict holds them.

    >>> as_lists((1.0, (None, 2.0))), as_lists(3.0)
    ([1.0, [None, 2.0]], 3.0)
    """
    return [as_lists(part) for part in value] if isinstance(value, tuple) else value


def as_tuples(value: Any) -> Any:
    """The inverse of `as_lists`."""
    return tuple(as_tuples(part) for part in value) if isinstance(value, list) else value
