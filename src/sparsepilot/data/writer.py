"""Writing a cache: plan it, write its shards from any number of processes, seal it.

Nothing but whole shards is ever written, and a shard counts only once its marker lies in `done/`; so a writer that is
killed, or meets a full disk, loses at most the shard that it was writing. A shard is written under a lock of its own,
and only where it is not whole: two writers that were given the same one (a run that builds its cache, while an array of
jobs still writes it) do not destroy each other's files, nor those of a cache that is sealed meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from sparsepilot import faults
from sparsepilot.data import layout
from sparsepilot.data.cache import Cache
from sparsepilot.data.dtypes import STORED, as_numpy, dequantize, quantize
from sparsepilot.data.files import canonical_json, one_at_a_time, read_json, remove_partials, sha256, write_json
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.statistics import Moments, moments, no_moments, site_stats
from sparsepilot.errors import DataError, nearest
from sparsepilot.run_folder import sync_folder


class ShardsMissingError(DataError):
    """A cache cannot be sealed yet: some writer has not finished."""


def create(path: str | Path, plan: CachePlan) -> None:
    """Makes the empty cache `plan` at `path`; does nothing where that very plan lies already.

    Any number of processes may call it at once: the folder is made aside and renamed into place. DataError when
    `path` holds another plan (it says which field differs) or something that is no cache.
    """
    path = Path(path)
    if not (path / layout.PLAN_FILE).exists():
        foreign = path.exists() and (not path.is_dir() or any(path.iterdir()))
        # looked at again: another process may have put the cache there between the two looks
        if foreign and not (path / layout.PLAN_FILE).exists():
            raise DataError(f"{path}: exists and is no activation cache; choose an empty or a new folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            layout.create_group(aside / layout.GROUP_FOLDER, plan)
            write_json(aside / layout.PLAN_FILE, plan.to_json())
            aside.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            if not (path / layout.PLAN_FILE).exists():  # else another process was faster, which is as good
                raise DataError(f"{path}: cannot create the cache: {error.strerror or error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _same_plan(path, plan)


def load_plan(path: Path) -> CachePlan:
    if not (path / layout.PLAN_FILE).is_file():
        raise DataError(f"{path}: no activation cache here; create one with scripts/cache_activations.py")
    return CachePlan(**read_json(path / layout.PLAN_FILE))


def _same_plan(path: Path, plan: CachePlan) -> None:
    there = load_plan(path).to_json()
    for name, wanted in plan.to_json().items():
        if there[name] != wanted:
            raise DataError(
                f"{path}: holds another cache: {name} is {there[name]!r} there and {wanted!r} here; "
                "use another path, or ask for what is there"
            )


class CacheWriter:
    """Writes the shards of one process: of `world` writers, rank r takes shards r, r + world, r + 2 world ...

    Another `world` at the next start is fine: what is whole stays, and the rest is dealt anew.
    """

    def __init__(self, path: str | Path, rank: int = 0, world: int = 1) -> None:
        self.path = Path(path)
        self.plan = load_plan(self.path)
        if not 0 <= rank < world:
            raise DataError(f"rank={rank} of world={world} writers; ranks go from 0 to {world - 1}")
        self.rank = rank
        self.world = world
        self._group = layout.open_for_writing(self.path)
        self._held: set[int] = set()

    def pending(self) -> list[range]:
        """The global row ranges, one per shard, that this rank still has to write."""
        return [self.plan.shard_range(shard) for shard in self.own_shards() if not self._is_whole(shard)]

    def shares(self, wait: Callable[[], None] = lambda: None) -> Iterator[range]:
        """Each of `pending()` in its turn, to be written before the next one is asked for.

        Until then no other process writes it. One that another process is at just now is waited for, after a call of
        `wait`, and passed over where it is whole then.
        """
        for shard in self.own_shards():
            with self._turn(shard, wait) as mine:
                if mine:
                    yield self.plan.shard_range(shard)

    def own_shards(self) -> range:
        """The shards that this rank is to write, whole or not."""
        return range(self.rank, self.plan.num_shards, self.world)

    def _is_whole(self, shard: int) -> bool:
        return _whole_marker(self.path, self.plan, shard) is not None

    @contextlib.contextmanager
    def _turn(self, shard: int, wait: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Whether this shard is to be written; by nobody else then, until the end of the context."""
        if shard in self._held or self._is_whole(shard):
            yield shard in self._held
            return
        with one_at_a_time(layout.marker_file(self.path, shard), wait):
            self._held.add(shard)
            try:
                yield not self._is_whole(shard)
            finally:
                self._held.discard(shard)

    def finish(self) -> Cache | None:
        """Seals the cache when every rank's shards are whole; None while only those of other ranks are missing."""
        try:
            return seal(self.path)
        except ShardsMissingError:
            if self.pending():
                raise
            return None

    def write_shard(self, rows: range, x: Mapping[str, Tensor], tokens: Any, positions: Any, documents: Any) -> None:
        """Writes one whole shard: `x[site]` is [len(rows), d], the labels are [len(rows)] integers.

        `rows` is one of `pending()`. Everything is checked before the first byte is written. DataError on a wrong
        range, site, width or dtype, on NaN or infinite values (site and row), and when the disk refuses the bytes
        (shards that were whole stay whole). Where another process has written it meanwhile, that stays.
        """
        shard = self._shard_of(rows)
        arrays, stats = self._encode(rows, x)
        labels = {"tokens": tokens, "position": positions, "document": documents}
        for name, values in labels.items():
            arrays[name] = _label(name, values, len(rows))
        try:
            with self._turn(shard) as mine:
                if mine:
                    self._store(shard, rows, arrays, stats)
        except OSError as error:
            whole = sum(map(self._is_whole, range(self.plan.num_shards)))
            raise DataError(
                f"{self.path}: cannot write shard {shard} (rows {rows.start} to {rows.stop - 1}): "
                f"{error.strerror or error}; {whole} of {self.plan.num_shards} shards are whole and stay: "
                "make room and start the same command again"
            ) from error

    def _shard_of(self, rows: range) -> int:
        shard, offset = divmod(rows.start, self.plan.shard_rows)
        if offset or not 0 <= shard < self.plan.num_shards or rows != self.plan.shard_range(shard):
            raise DataError(
                f"rows {rows.start} to {rows.stop} are no whole shard: shards of {self.plan.shard_rows} rows start at "
                f"its multiples and end at {self.plan.num_rows}"
            )
        return shard

    def _encode(self, rows: range, x: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, Moments]]:
        """The arrays of the sites as they go to disk, and the sums of their training rows as they will be read."""
        plan = self.plan
        for site in x:
            if site not in plan.widths:
                raise DataError(f"{self.path}: site {site!r} is not in this cache; {nearest(site, plan.widths)}")
        num_train = max(0, min(rows.stop, plan.num_train_rows) - rows.start)
        arrays: dict[str, np.ndarray] = {}
        stats: dict[str, Moments] = {}
        for site, width in plan.widths.items():
            if site not in x:
                raise DataError(f"{self.path}: site {site!r} is missing from rows {rows.start} to {rows.stop - 1}")
            x_BD = _checked(site, x[site], (len(rows), width), plan.dtype, rows.start)
            if plan.dtype == "int8":
                code_BD, scale_B = quantize(x_BD)
                arrays[layout.site_array(site)] = as_numpy(code_BD)
                arrays[layout.scale_array(site)] = as_numpy(scale_B)
                stats[site] = moments(dequantize(code_BD[:num_train], scale_B[:num_train]))
            else:
                arrays[layout.site_array(site)] = as_numpy(x_BD)
                stats[site] = moments(x_BD[:num_train])
        return arrays, stats

    def _store(self, shard: int, rows: range, arrays: dict[str, np.ndarray], stats: dict[str, Moments]) -> None:
        marker: dict[str, Any] = {"shard": shard, "start": rows.start, "stop": rows.stop, "arrays": {}}
        layout.marker_file(self.path, shard).unlink(missing_ok=True)
        for name in layout.array_specs(self.plan):
            file = layout.shard_file(self.path, name, shard)
            # zarr would read a left-over file of a short last shard and merge into it; it may be anything, so it goes.
            file.unlink(missing_ok=True)
            if file.parent.is_dir():
                remove_partials(file)
            self._array(name)[rows.start : rows.stop] = arrays[name]
            marker["arrays"][name] = {
                "sha256": sha256(layout.little_endian(arrays[name]).data),
                "file_bytes": file.stat().st_size,
            }
        marker["stats"] = {site: part.to_json() for site, part in stats.items()}
        faults.point("cache-shard-write")
        write_json(layout.marker_file(self.path, shard), marker)

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array


def _checked(site: str, x_BD: Tensor, shape: tuple[int, int], dtype: str, first_row: int) -> Tensor:
    """`x_BD` detached, contiguous, on the CPU, after every check that the writer promises."""
    allowed = (torch.float16, torch.bfloat16, torch.float32) if dtype == "int8" else (STORED[dtype].torch_dtype,)
    if x_BD.dtype not in allowed:
        names = " or ".join(str(a).removeprefix("torch.") for a in allowed)
        raise DataError(f"site {site!r}: rows are {x_BD.dtype}, this cache takes {names}")
    if tuple(x_BD.shape) != shape:
        raise DataError(f"site {site!r}: rows have shape {list(x_BD.shape)}, this shard takes {list(shape)}")
    finite_B = x_BD.isfinite().all(dim=1)
    if not bool(finite_B.all()):
        bad = int((~finite_B).nonzero()[0, 0])
        raise DataError(
            f"site {site!r}: row {first_row + bad} holds NaN or infinite values "
            f"({int((~finite_B).sum())} such rows in this shard); a cache takes finite rows only"
        )
    return x_BD.detach().cpu().contiguous()


def _label(name: str, values: Any, num_rows: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (num_rows,) or array.dtype.kind not in "iu":
        raise DataError(f"{name}: shape {list(array.shape)} of {array.dtype}; [{num_rows}] integers are needed")
    if num_rows and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise DataError(f"{name}: values from {array.min()} to {array.max()}; 0 to 2147483647 can be stored")
    return array.astype(np.int32)


def _whole_marker(path: Path, plan: CachePlan, shard: int) -> dict[str, Any] | None:
    """The shard's marker where its files lie there with the sizes that it recorded; None where it must be written."""
    try:
        marker = read_json(layout.marker_file(path, shard))
    except (FileNotFoundError, DataError):  # a damaged marker vouches for nothing
        return None
    for name in layout.array_specs(plan):
        file = layout.shard_file(path, name, shard)
        if not file.is_file() or file.stat().st_size != marker["arrays"][name]["file_bytes"]:
            return None
    return marker


def write_planted_features(path: str | Path, features_FD: Tensor) -> None:
    """Stores the true dictionary of a synthetic cache ([num_features, d] fp32); call it before the last shard."""
    group = layout.open_for_writing(Path(path))
    values = features_FD.detach().cpu().float().numpy()
    array = group.create_array(
        layout.PLANTED_FEATURES,
        shape=values.shape,
        chunks=values.shape,
        dtype="float32",
        fill_value=float("nan"),
        filters=None,
        compressors=[Crc32cCodec()],
        overwrite=True,
    )
    array[:] = values


def seal(path: str | Path) -> Cache:
    """Checks that every shard is whole, merges the writers' sums, and writes the manifest that lets the cache open.

    Sealing twice is harmless. ShardsMissingError when shards are missing (how many, and which is the first), another
    DataError when something is damaged.
    """
    path = Path(path)
    plan = load_plan(path)
    names = list(layout.array_specs(plan))
    totals = {site: no_moments(width) for site, width in plan.widths.items()}
    file_bytes: dict[str, list[int]] = {name: [] for name in names}
    # Over the plan and the content of the rows, not over files: the same whoever wrote which shard, in which order.
    digest = hashlib.sha256(canonical_json(plan.to_json()))
    missing: list[int] = []
    for shard in range(plan.num_shards):
        marker = _whole_marker(path, plan, shard)
        if marker is None:
            missing.append(shard)
            continue
        for name in names:
            file_bytes[name].append(marker["arrays"][name]["file_bytes"])
        for site in totals:
            totals[site] = totals[site].plus(Moments.from_json(marker["stats"][site]))
        digest.update(canonical_json({name: marker["arrays"][name]["sha256"] for name in names}))
    if missing:
        raise ShardsMissingError(
            f"{path}: {len(missing)} of {plan.num_shards} shards are missing, the first at row "
            f"{plan.shard_range(missing[0]).start}; start the writer again to finish them"
        )
    extras: dict[str, Any] = {}
    planted = path / layout.GROUP_FOLDER / layout.PLANTED_FEATURES
    if (planted / "zarr.json").is_file():
        content = sha256((planted / "c/0/0").read_bytes())
        extras[layout.PLANTED_FEATURES] = content
        digest.update(content.encode())
    fingerprint = digest.hexdigest()

    _describe(path, plan, fingerprint, totals)
    write_json(
        path / layout.MANIFEST_FILE,
        {
            "format": layout.FORMAT_VERSION,
            "plan": plan.to_json(),
            "fingerprint": fingerprint,
            "stats": {site: total.to_json() for site, total in totals.items()},
            "file_bytes": file_bytes,
            "metadata_sha256": {
                name: sha256((path / layout.GROUP_FOLDER / name / "zarr.json").read_bytes())
                for name in [*names, *extras]
            },
        },
    )
    for lock in (path / layout.DONE_FOLDER).glob(".*.lock"):  # whoever holds one finds its shard whole
        lock.unlink(missing_ok=True)
    return Cache(path)


def _describe(path: Path, plan: CachePlan, fingerprint: str, totals: dict[str, Moments]) -> None:
    """Puts what a person with another zarr reader wants to know into the group's attributes."""
    stats = {site: site_stats(total) for site, total in totals.items()}
    layout.open_for_writing(path).attrs.put(
        {
            "format": layout.FORMAT_VERSION,
            "fingerprint": fingerprint,
            **plan.to_json(),
            "stats": {
                site: {
                    "mean": s.mean_D.tolist(),
                    "variance": s.variance_D.tolist(),
                    "mean_sq_norm": s.mean_sq_norm,
                    "scale": s.scale,
                }
                for site, s in stats.items()
            },
        }
    )
