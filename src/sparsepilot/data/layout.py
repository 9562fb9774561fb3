"""The arrays of a cache and how zarr opens them.

<cache>/plan.json            what was planned (written first)
<cache>/data.zarr/           a zarr v3 group that any zarr reader opens
    activations/<site>       [rows, d]
    scales/<site>            [rows], with dtype int8 only
    tokens, position, document   [rows] int32
    planted/features         [num_features, d], synthetic caches only
<cache>/done/<shard>.json    one marker per whole shard: checksums and sums, written after the shard's arrays
                             (.<shard>.json.lock: of its writer, until the cache is sealed)
<cache>/manifest.json        the seal (written last)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from sparsepilot.data.dtypes import STORED
from sparsepilot.data.files import write_durably
from sparsepilot.data.plan import CachePlan

FORMAT_VERSION = 1
PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
GROUP_FOLDER = "data.zarr"
DONE_FOLDER = "done"
ROW_LABELS = ("tokens", "position", "document")
PLANTED_FEATURES = "planted/features"

_config_lock = threading.Lock()


class ArraySpec(NamedTuple):
    width: int | None
    """None: one number per row"""
    dtype: str
    fill: float | int


def site_array(site: str) -> str:
    return f"activations/{site}"


def scale_array(site: str) -> str:
    return f"scales/{site}"


def array_specs(plan: CachePlan) -> dict[str, ArraySpec]:
    """Every row array of a cache by its name in the group, in the order in which a shard is written."""
    stored = STORED[plan.dtype]
    specs = {site_array(s): ArraySpec(w, stored.numpy_dtype, stored.fill) for s, w in plan.widths.items()}
    if plan.dtype == "int8":
        specs |= {scale_array(s): ArraySpec(None, "float32", float("nan")) for s in plan.widths}
    return specs | {name: ArraySpec(None, "int32", -1) for name in ROW_LABELS}


def shard_file(cache: Path, array: str, shard: int) -> Path:
    """The file of one shard of one row array (zarr's default chunk keys)."""
    columns = "/0" if array.startswith("activations/") else ""
    return cache / GROUP_FOLDER / array / f"c/{shard}{columns}"


def marker_file(cache: Path, shard: int) -> Path:
    return cache / DONE_FOLDER / f"{shard:08d}.json"


class DurableStore(LocalStore):
    """A LocalStore whose `set` also flushes: see `files.write_durably`."""

    async def set(self, key: str, value: Buffer) -> None:
        fault = None if key.endswith("zarr.json") else "cache-shard-write"
        await asyncio.to_thread(write_durably, self.root / key, value.as_buffer_like(), fault)


@contextmanager
def plain_zarr() -> Iterator[None]:
    """Arrays opened inside use zarr-python's own codec pipeline for life, whatever the program has configured.

    Not zarrs': that one writes files in place, in the order in which its threads finish, so neither atomically nor
    with the same bytes twice. zarr's configuration is one per process, hence the lock; it is put back afterwards.
    """
    with _config_lock, zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        yield


def create_group(folder: Path, plan: CachePlan) -> None:
    """Writes the metadata of the group and of every row array into `folder`; no row yet."""
    with plain_zarr():
        group = zarr.open_group(DurableStore(folder), mode="w-", zarr_format=3)
        for name, spec in array_specs(plan).items():
            columns = () if spec.width is None else (spec.width,)
            group.create_array(
                name,
                shape=(plan.num_rows, *columns),
                chunks=(plan.chunk_rows, *columns),
                shards=(plan.shard_rows, *columns),
                dtype=spec.dtype,
                fill_value=spec.fill,
                filters=None,
                serializer=BytesCodec(endian="little"),
                compressors=[Crc32cCodec()],  # on each inner chunk; the shard's index has one by default
                attributes=_attributes(name, plan),
            )


def _attributes(name: str, plan: CachePlan) -> dict[str, Any]:
    if not name.startswith("activations/"):
        return {}
    notes = {"bfloat16": "bits of bfloat16 in uint16", "int8": "times scales/<site> of the row"}
    return {"dtype": plan.dtype} | ({"encoding": notes[plan.dtype]} if plan.dtype in notes else {})


def open_for_writing(cache: Path) -> zarr.Group:
    """The group behind a store that flushes, with zarr's own encoder."""
    with plain_zarr():
        return zarr.open_group(DurableStore(cache / GROUP_FOLDER), mode="r+", zarr_format=3)


def open_planted(cache: Path) -> np.ndarray:
    """The planted features [num_features, d] fp32. Raises whatever zarr raises on damage."""
    with plain_zarr():
        array = zarr.open_array(LocalStore(cache / GROUP_FOLDER, read_only=True), path=PLANTED_FEATURES, mode="r")
    return np.asarray(array[:])


def little_endian(values: np.ndarray) -> np.ndarray:
    """The array as it lies on disk, contiguous: what content checksums are taken of."""
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
