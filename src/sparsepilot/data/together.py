"""Several caches read as one, row by row: the same text through several language models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sparsepilot.data.cache import Cache, Manifest
from sparsepilot.data.files import canonical_json
from sparsepilot.data.statistics import SiteStats
from sparsepilot.errors import ConfigError, DataError, nearest

_LABEL_ROWS = 2**20


class Caches:
    """Sealed caches of the same rows, by the names that `paths` gives them; to its readers, one cache of all sites.

    The site `model.layers.9` of the cache `base` is called `base/model.layers.9`: no site has a slash in its own name,
    and it needs no quotes on Hydra's command line. Number formats and chunk sizes may differ.

    Raises ConfigError for names that cannot be or are not read, DataError when a cache cannot be opened (see `Cache`)
    or two of them hold other rows.
    """

    def __init__(self, paths: Mapping[str, str], sites: Sequence[str]) -> None:
        for name, path in paths.items():
            if not re.fullmatch(r"[\w-]+", str(name)):
                raise ConfigError(f"data.path.{name} = {path!r}: a cache's name is made of letters, digits, _ and -")
            if not any(_is_of(site, name) for site in sites):
                raise ConfigError(f"data.path.{name} = {path!r}: data.sites names none of its sites; take it out")
        self._caches: dict[str, Cache] = {}
        for name, path in paths.items():
            self._caches[name] = Cache(path, [site.removeprefix(f"{name}/") for site in sites if _is_of(site, name)])
        self.widths = {site: cache.widths[own] for site in sites for cache, own in [self._of(site)]}
        self._first, *others = self._caches.values()
        for other in others:
            _check_same_rows(self._first, other)

    def __str__(self) -> str:
        return " and ".join(map(str, self._caches.values()))

    @property
    def fingerprint(self) -> str:
        """Hex digest of the caches' fingerprints under their names."""
        digests = {name: cache.fingerprint for name, cache in self._caches.items()}
        return hashlib.sha256(canonical_json(digests)).hexdigest()

    @property
    def source(self) -> dict[str, Any]:
        """Each cache's source under its name."""
        return {name: cache.source for name, cache in self._caches.items()}

    @property
    def num_train_rows(self) -> int:
        return self._first.num_train_rows

    @property
    def num_val_rows(self) -> int:
        return self._first.num_val_rows

    @property
    def chunk_rows(self) -> int:
        """The largest of all, as in one cache of all sites: with the default sizes it is whole chunks of each."""
        return max(cache.chunk_rows for cache in self._caches.values())

    def dtype_of(self, site: str) -> str:
        cache, name = self._of(site)
        return cache.dtype_of(name)

    def row_bytes(self, site: str) -> int:
        cache, name = self._of(site)
        return cache.row_bytes(name)

    def stats(self, site: str) -> SiteStats:
        cache, name = self._of(site)
        return cache.stats(name)

    def read(self, site: str, start: int, stop: int) -> Tensor:
        cache, name = self._of(site)
        return cache.read(name, start, stop)

    def empty(self, site: str, num_rows: int) -> Tensor:
        cache, name = self._of(site)
        return cache.empty(name, num_rows)

    def fill(self, start: int, rows: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        for site, rows_BD in rows.items():
            cache, name = self._of(site)
            cache.read_into(name, start, rows_BD)
        for site, scale_B in scales.items():
            cache, name = self._of(site)
            cache.read_scales_into(name, start, scale_B)

    def planted_features(self) -> Tensor | None:
        """None: what was planted in each cache by itself is no dictionary of all of them."""
        return None

    def disk_bytes(self) -> int:
        return sum(cache.disk_bytes() for cache in self._caches.values())

    def _of(self, site: str) -> tuple[Cache, str]:
        """The cache that has the site, and its name there."""
        name, _, own = site.partition("/")
        if name not in self._caches:
            raise DataError(f"{self}: no site {site!r} in these caches; {nearest(site, self.widths)}")
        return self._caches[name], own


AnyCache = Cache | Caches


def known_sites(path: str | Mapping[str, str]) -> list[str]:
    """The sites of the cache at `path`, or of several caches by their names. DataError as from `Cache`."""
    if isinstance(path, str):
        return list(Manifest.read(Path(path)).plan.widths)
    return [f"{name}/{site}" for name, each in path.items() for site in known_sites(each)]


def open_sites(path: str | Mapping[str, str], sites: Sequence[str]) -> AnyCache:
    """Opens these sites of the cache at `path`, or of several. Raises what `Cache` and `Caches` do."""
    return Cache(path, sites) if isinstance(path, str) else Caches(path, sites)


def _is_of(site: str, name: str) -> bool:
    return site.partition("/")[0] == name


def _check_same_rows(first: Cache, other: Cache) -> None:
    """DataError, naming both paths and what differs, unless both hold the same tokens in the same places."""
    found = _difference(first, other)
    if found:
        raise DataError(
            f"{first} and {other} hold different rows: {found}; caches that are read together are made from the same "
            "text with the same tokenizer, data.build.context_length, max_tokens and val_fraction"
        )


def _difference(first: Cache, other: Cache) -> str | None:
    for what in ("num_train_rows", "num_val_rows"):
        a, b = getattr(first, what), getattr(other, what)
        if a != b:
            return f"{what} is {a} in the first and {b} in the second"
    digest = first.source.get("rows_digest")
    if digest is not None and digest == other.source.get("rows_digest"):
        return None  # harvested from equal tokens, mask and documents: no need to read them
    labels = {"token": Cache.tokens, "position": Cache.positions, "document": Cache.documents}
    num_rows = first.num_train_rows + first.num_val_rows
    for start in range(0, num_rows, _LABEL_ROWS):
        stop = min(start + _LABEL_ROWS, num_rows)
        for what, labels_of in labels.items():
            a_B, b_B = labels_of(first, start, stop), labels_of(other, start, stop)
            differing = np.flatnonzero(a_B != b_B)
            if len(differing):
                i = differing[0]
                return f"the {what} of row {start + i} is {a_B[i]} in the first and {b_B[i]} in the second"
    return None
