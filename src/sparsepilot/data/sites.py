"""Which sites of a cache a configuration means: names and globs, side by side in an order that does not vary."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from sparsepilot.errors import DataError, nearest


def expand_sites(patterns: Iterable[str], known: Iterable[str], where: str) -> list[str]:
    """The sites of a cache that `patterns` name, in the order of the patterns; duplicates once.

    `*` stands for one part of the dotted path, `:out` is the default and is dropped: as `lm.capture.expand_sites`
    reads them when the cache is made. Of several caches (`together.Caches`), a site is `base/model.layers.9`, and `*`
    before the slash stands for any of them. Within one pattern numbers count as numbers: layer 10 comes after layer 9.
    Raises DataError, with the nearest names, for a pattern that matches nothing; `where` begins the message.
    """
    names = sorted(known, key=_numeric_order)
    sites: dict[str, None] = {}
    for pattern in patterns:
        wanted = pattern.removesuffix(":out")
        hits = [wanted] if wanted in names else [name for name in names if _matches(name, wanted)]
        if not hits:
            raise DataError(f"{where}: no site {pattern!r} in this cache; {nearest(wanted, names)}")
        sites.update(dict.fromkeys(hits))
    return list(sites)


def _matches(name: str, pattern: str) -> bool:
    (path, _, side), (pattern_path, _, pattern_side) = name.partition(":"), pattern.partition(":")
    (cache, _, path), (pattern_cache, _, pattern_path) = path.rpartition("/"), pattern_path.rpartition("/")
    parts, pattern_parts = path.split("."), pattern_path.split(".")
    return (
        side == pattern_side
        and fnmatch.fnmatchcase(cache, pattern_cache)
        and len(parts) == len(pattern_parts)
        and all(map(fnmatch.fnmatchcase, parts, pattern_parts))
    )


def _numeric_order(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in name.replace(":", ".").split(".")]
