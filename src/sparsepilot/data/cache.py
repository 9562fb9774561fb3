"""Reading a sealed activation cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsepilot.data import layout
from sparsepilot.data.dtypes import STORED, as_numpy, dequantize, row_bytes
from sparsepilot.data.files import read_json, reading, sha256
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.shards import ShardedArray
from sparsepilot.data.statistics import Moments, SiteStats, site_stats
from sparsepilot.errors import DataError, nearest


@dataclass(frozen=True)
class Manifest:
    """The seal of a cache: everything about it but the rows."""

    format: int
    plan: CachePlan
    fingerprint: str
    stats: dict[str, Moments]
    file_bytes: dict[str, list[int]]
    metadata_sha256: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """DataError when the cache is missing, unfinished, of another format or not to be read."""
        with reading(path):
            return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> Manifest:
        if not (path / layout.MANIFEST_FILE).is_file():
            if not (path / layout.PLAN_FILE).is_file():
                raise DataError(f"{path}: no activation cache here; create one with scripts/cache_activations.py")
            plan = CachePlan(**read_json(path / layout.PLAN_FILE))
            missing = sum(not layout.marker_file(path, shard).is_file() for shard in range(plan.num_shards))
            raise DataError(
                f"{path}: unfinished, {missing} of {plan.num_shards} shards are missing; start its writer again"
                if missing
                else f"{path}: all {plan.num_shards} shards are there but it was never sealed; start its writer again"
            )
        content = read_json(path / layout.MANIFEST_FILE)
        if content.get("format") != layout.FORMAT_VERSION:
            raise DataError(f"{path}: cache format {content.get('format')}, this version reads {layout.FORMAT_VERSION}")
        content["plan"] = CachePlan(**content["plan"])
        content["stats"] = {site: Moments.from_json(value) for site, value in content["stats"].items()}
        return cls(**content)


class Cache:
    """A sealed cache, opened read-only.

    Opening checks the seal, that every file of the wanted arrays is there with its size, and the arrays' metadata;
    it reads no rows. Every read is checked against the chunks' checksums. `sites` limits what is opened (None: all).
    Several processes may each open it.

    Raises DataError, one line, when the cache is missing, unfinished, damaged or lacks a site.
    """

    def __init__(self, path: str | Path, sites: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        plan = self.manifest.plan
        for site in sites or ():
            self._known(site)
        self.widths = {site: plan.widths[site] for site in (plan.widths if sites is None else sites)}
        self._arrays: dict[str, ShardedArray] = {}
        with reading(self.path):
            self._open_all()

    def _open_all(self) -> None:
        for name in layout.array_specs(self.manifest.plan):
            if name.split("/", 1)[-1] in {*self.widths, *layout.ROW_LABELS}:
                self._open(name)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the plan and of every stored row."""
        return self.manifest.fingerprint

    @property
    def dtype(self) -> str:
        return self.manifest.plan.dtype

    @property
    def source(self) -> dict[str, Any]:
        """Where the rows come from, as the plan says."""
        return self.manifest.plan.source

    @property
    def num_train_rows(self) -> int:
        return self.manifest.plan.num_train_rows

    @property
    def num_val_rows(self) -> int:
        return self.manifest.plan.num_val_rows

    @property
    def chunk_rows(self) -> int:
        return self.manifest.plan.chunk_rows

    def dtype_of(self, site: str) -> str:
        """How rows of a site are stored."""
        self._width(site)
        return self.dtype

    def row_bytes(self, site: str) -> int:
        """Bytes of one stored row of a site."""
        return row_bytes(self._width(site), self.dtype)

    def stats(self, site: str) -> SiteStats:
        """Mean, variance and scale of the site's training rows, taken while they were written."""
        self._known(site)
        return site_stats(self.manifest.stats[site])

    def read(self, site: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a site: [stop - start, d] in the stored dtype; int8 is decoded to fp32."""
        code_BD = self.empty(site, stop - start)
        self.read_into(site, start, code_BD)
        if self.dtype != "int8":
            return code_BD
        scale_B = torch.empty(stop - start)
        self.read_scales_into(site, start, scale_B)
        return dequantize(code_BD, scale_B)

    def empty(self, site: str, num_rows: int) -> Tensor:
        """Uninitialised memory for stored rows of a site."""
        return torch.empty(num_rows, self._width(site), dtype=STORED[self.dtype].torch_dtype)

    def read_into(self, site: str, start: int, out_BD: Tensor) -> None:
        """Fills contiguous `out_BD` (stored dtype) with the site's rows from `start` on."""
        self._width(site)
        self._read(layout.site_array(site), start, as_numpy(out_BD))

    def read_scales_into(self, site: str, start: int, out_B: Tensor) -> None:
        """Fills `out_B` (fp32) with the scales of the int8 rows from `start` on."""
        self._width(site)
        self._read(layout.scale_array(site), start, out_B.numpy())

    def fill(self, start: int, rows: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        """Fills rows[site] (and scales[site] of int8 rows) with the rows of each site from `start` on."""
        for site, rows_BD in rows.items():
            self.read_into(site, start, rows_BD)
        for site, scale_B in scales.items():
            self.read_scales_into(site, start, scale_B)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids of rows [start, stop), int32."""
        return self._labels("tokens", start, stop)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions in their contexts of rows [start, stop), int32."""
        return self._labels("position", start, stop)

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Document ids of rows [start, stop), int32."""
        return self._labels("document", start, stop)

    def planted_features(self) -> Tensor | None:
        """The true dictionary [num_features, d] fp32 of a synthetic cache; None for a real one."""
        name = layout.PLANTED_FEATURES
        if name not in self.manifest.metadata_sha256:
            return None
        self._check_metadata(name)
        try:
            values = layout.open_planted(self.path)
        except Exception as error:
            raise DataError(f"{self.path}: array {name!r}, chunk 0 is damaged: {error}") from error
        return torch.from_numpy(np.asarray(values))

    def disk_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def _known(self, site: str) -> None:
        known = self.manifest.plan.widths
        if site not in known:
            raise DataError(f"{self.path}: no site {site!r} in this cache; {nearest(site, known)}")

    def _width(self, site: str) -> int:
        if site not in self.widths:
            self._known(site)
            raise DataError(f"{self.path}: site {site!r} was not opened; opened: {', '.join(self.widths)}")
        return self.widths[site]

    def _labels(self, name: str, start: int, stop: int) -> np.ndarray:
        array = self._arrays[name]
        out = np.empty(stop - start, dtype=array.dtype)
        self._read(name, start, out)
        return out

    def _check_metadata(self, name: str) -> None:
        file = self.path / layout.GROUP_FOLDER / name / "zarr.json"
        if not file.is_file() or sha256(file.read_bytes()) != self.manifest.metadata_sha256[name]:
            raise DataError(f"{self.path}: array {name!r}: its metadata {file.name} is missing or damaged")

    def _open(self, name: str) -> None:
        self._check_metadata(name)
        for shard, expected in enumerate(self.manifest.file_bytes[name]):
            file = layout.shard_file(self.path, name, shard)
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
                raise DataError(f"{self.path}: array {name!r}: the file of shard {shard} {state}; write it again")
        self._arrays[name] = ShardedArray(self.path, name, self.manifest.plan)

    def _read(self, name: str, start: int, out: np.ndarray) -> None:
        stop = start + len(out)
        if not 0 <= start <= stop <= self.manifest.plan.num_rows:
            raise DataError(f"{self.path}: rows {start} to {stop} of {self.manifest.plan.num_rows} cannot be read")
        self._arrays[name].read_into(start, out)
