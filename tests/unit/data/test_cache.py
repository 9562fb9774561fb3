"""Opening and reading: a damaged or unfinished cache never passes for a whole one."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import tiny_cache
import torch

from sparsepilot.data import layout, shards
from sparsepilot.data.cache import Cache
from sparsepilot.errors import DataError

SITE, SMALL = tiny_cache.WIDTHS


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache.sealed(tmp_path_factory.mktemp("cache") / "c").path


@contextmanager
def flipped(file: Path, offset: int, bit: int) -> Iterator[None]:
    before = file.read_bytes()
    after = bytearray(before)
    after[offset] ^= 1 << bit
    file.write_bytes(after)
    try:
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["activations/model.layers.1", "tokens", "position", "document"])
def test_a_flipped_bit_anywhere_is_an_error_that_names_array_and_chunk(path: Path, name: str) -> None:

    def read(start: int, stop: int) -> None:
        cache = Cache(path)  # a fresh one: an index that was once seen whole is not read again
        by_name = {"tokens": cache.tokens, "position": cache.positions, "document": cache.documents}
        by_name.get(name, partial(cache.read, SITE))(start, stop)

    chunk_bytes = 32 * (24 * 2 if name.startswith("activations") else 4) + 4
    index_bytes = 4 * 16 + 4
    rng = random.Random(name)
    for shard in (0, 3, 6):
        file = layout.shard_file(path, name, shard)
        size = file.stat().st_size
        chunks = (size - index_bytes) // chunk_bytes
        assert chunks * chunk_bytes + index_bytes == size  # every byte is data, a checksum or the index
        for offset in [0, size - 1, size - 4, size - index_bytes, *rng.sample(range(size), 20)]:
            with flipped(file, offset, rng.randrange(8)):
                hit = offset // chunk_bytes if offset < size - index_bytes else 0  # the index damages all its chunks
                expected = rf"array '{re.escape(name)}', chunk {shard * 4 + hit} \(rows .*shard {shard}\) is damaged"
                with pytest.raises(DataError, match=expected):
                    read(0, 830)
                if offset < size - index_bytes and shard * 128 + hit * 32 > 0:
                    read(0, shard * 128 + hit * 32)  # rows before it are still readable
    read(0, 830)


def test_a_flipped_bit_in_an_int8_scale(tmp_path: Path) -> None:
    path = tiny_cache.sealed(tmp_path / "c", "int8").path
    cache = Cache(path)
    with (
        flipped(layout.shard_file(path, layout.scale_array(SITE), 1), 3, 0),
        pytest.raises(DataError, match=r"array 'scales/model\.layers\.1', chunk 4 "),
    ):
        cache.read(SITE, 0, 830)


def test_a_shard_that_vanishes_after_opening_is_not_zeros(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "c")
    cache = Cache(tmp_path / "c")
    layout.shard_file(tmp_path / "c", layout.site_array(SITE), 2).unlink()
    with pytest.raises(DataError, match="shard 2"):
        cache.read(SITE, 0, 830)


def test_missing_files_and_sizes_are_found_on_opening(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    shutil.copytree(path, copy)
    file = layout.shard_file(copy, "tokens", 5)
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=f"array 'tokens': the file of shard 5 has {len(whole) - 7} bytes instead of"):
        Cache(copy)
    file.unlink()
    with pytest.raises(DataError, match="array 'tokens': the file of shard 5 is missing"):
        Cache(copy)
    file.write_bytes(whole)
    Cache(copy)
    shutil.rmtree(copy / "data.zarr/activations" / SMALL)
    Cache(copy, [SITE])  # a site that is not asked for is not looked at
    with pytest.raises(DataError, match=f"array 'activations/{SMALL}': its metadata zarr.json is missing"):
        Cache(copy)


@pytest.mark.parametrize(
    "name", ["manifest.json", "data.zarr/tokens/zarr.json", "data.zarr/activations/model.layers.1/zarr.json"]
)
def test_flipped_bits_in_json_are_found(path: Path, name: str) -> None:
    file = path / name
    rng = random.Random(name)
    for offset in rng.sample(range(file.stat().st_size), 40):
        with flipped(file, offset, rng.randrange(7)), pytest.raises(DataError, match=r"damaged|metadata"):
            Cache(path)
    Cache(path)


def test_caches_that_are_not_there_or_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no activation cache here; create one with"):
        Cache(tmp_path / "nowhere")
    tiny_cache.write(tmp_path / "c", tiny_cache.plan())
    with pytest.raises(DataError, match="all 7 shards are there but it was never sealed"):
        Cache(tmp_path / "c")
    (tmp_path / "c" / "done/00000003.json").unlink()
    with pytest.raises(DataError, match="unfinished, 1 of 7 shards are missing"):
        Cache(tmp_path / "c")


def test_sites_that_are_not_there(path: Path) -> None:
    with pytest.raises(DataError, match=r"no site 'model.layers.11' in this cache; did you mean 'model.layers.1'"):
        Cache(path, ["model.layers.11"])
    cache = Cache(path, [SITE])
    assert cache.widths == {SITE: 24}
    with pytest.raises(DataError, match=r"was not opened; opened: model\.layers\.1"):
        cache.read(SMALL, 0, 1)
    with pytest.raises(DataError, match="rows 800 to 831 of 830 cannot be read"):
        cache.read(SITE, 800, 831)
    assert cache.planted_features() is None


def test_a_range_of_more_chunks_than_one_system_call_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Cache(path).read(SITE, 0, 830)
    monkeypatch.setattr(shards, "_MAX_CHUNKS_PER_CALL", 3)
    cache = Cache(path)
    for start, stop in [(0, 830), (5, 829), (33, 127), (40, 50), (100, 140)]:
        assert torch.equal(cache.read(SITE, start, stop), whole[start:stop])
