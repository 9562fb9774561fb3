"""The planted dictionary: its truth is in the cache, and building it can be broken off and taken up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sparsepilot.data import layout
from sparsepilot.data.cache import Cache
from sparsepilot.data.synthetic import SITE, PlantedRows, build
from sparsepilot.errors import ConfigError, DataError

SIZES = {"num_rows": 20_000, "num_val_rows": 3_000, "d_in": 32, "num_features": 48, "mean_active": 3.0, "noise": 0.01}
SMALL = {"chunk_rows": 64, "shard_rows": 2048, "seed": 5}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build(tmp_path_factory.mktemp("cache") / "c", **SIZES, **SMALL)  # type: ignore[arg-type]


def test_the_rows_are_sums_of_the_planted_features(cache: Cache) -> None:
    features_FD = cache.planted_features()
    assert features_FD is not None
    torch.testing.assert_close(features_FD.norm(dim=1), torch.ones(48))
    assert (cache.num_train_rows, cache.num_val_rows, cache.widths) == (20_000, 3_000, {SITE: 32})
    x = cache.read(SITE, 0, 23_000)
    documents = cache.documents(0, 23_000)
    assert len(np.unique(documents)) == -(-20_000 // 128) + -(-3_000 // 128)
    assert set(documents[:20_000]).isdisjoint(documents[20_000:])
    planted = PlantedRows(32, 48, 3.0, 0.01, seed=5)
    rest = F.normalize(x - planted.mean_D)
    cosine_BF = rest @ features_FD.T
    single = cosine_BF.amax(dim=1) > 0.99
    assert single.float().mean() > 0.1  # P(one firing) = 3 e^-3 = 0.15, plus repeats of one feature
    fired = cosine_BF[single].argmax(dim=1).bincount(minlength=48).float()
    assert fired[0] > 1.5 * fired[3] > 3 * fired[20] > 0  # power law


def test_a_broken_build_is_taken_up(cache: Cache, tmp_path: Path) -> None:
    def stop(made: int, total: int) -> None:
        assert total == 23_000
        if made > 3 * 2048:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", **SIZES, **SMALL, progress=stop)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="9 of 12 shards are missing"):
        Cache(tmp_path / "c")
    shown: list[tuple[int, int]] = []
    again = build(tmp_path / "c", **SIZES, **SMALL, progress=lambda *seen: shown.append(seen))  # type: ignore[arg-type]
    assert 3 * 2048 < shown[0][0] <= 4 * 2048  # what was there counts as made
    assert shown[-1] == (23_000, 23_000)
    assert again is not None
    assert again.fingerprint == cache.fingerprint


def test_two_writers_share_the_shards(cache: Cache, tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    common = {**SIZES, **SMALL, "world": 2, "progress": lambda *seen: shown.append(seen)}
    assert build(tmp_path / "c", rank=1, **common) is None  # type: ignore[arg-type]
    assert shown[-1] == (5 * 2048 + 23_000 % 2048, 5 * 2048 + 23_000 % 2048)
    with pytest.raises(DataError, match="6 of 12 shards are missing"):
        Cache(tmp_path / "c")
    whole = build(tmp_path / "c", rank=0, **common)  # type: ignore[arg-type]
    assert whole is not None
    assert whole.fingerprint == cache.fingerprint  # of rows and planted features


def test_another_sharding_holds_the_same_rows(cache: Cache, tmp_path: Path) -> None:
    other = build(tmp_path / "c", **SIZES, seed=5, chunk_rows=32, shard_rows=4128)  # type: ignore[arg-type]
    assert torch.equal(other.read(SITE, 0, 23_000), cache.read(SITE, 0, 23_000))
    assert (other.tokens(0, 23_000) == cache.tokens(0, 23_000)).all()


def test_int8_keeps_the_rows_within_its_step(cache: Cache, tmp_path: Path) -> None:
    small = build(tmp_path / "c", **SIZES, **SMALL, dtype="int8")  # type: ignore[arg-type]
    exact, coded = cache.read(SITE, 0, 23_000), small.read(SITE, 0, 23_000)
    assert ((exact - coded).abs() <= exact.abs().amax(dim=1, keepdim=True) / 254 * 1.0001).all()
    fvu = (exact - coded).square().sum() / (exact - exact.mean(0)).square().sum()
    assert fvu < 1e-4
    files = [sum(f.stat().st_size for f in (c.path / "data.zarr").rglob("0")) for c in (small, cache)]
    assert files[0] < 0.4 * files[1]


def test_damaged_truth_is_noticed(tmp_path: Path) -> None:
    cache = build(tmp_path / "c", **SIZES | {"num_rows": 300, "num_val_rows": 0}, seed=0)  # type: ignore[arg-type]
    file = cache.path / layout.GROUP_FOLDER / layout.PLANTED_FEATURES / "c/0/0"
    damaged = bytearray(file.read_bytes())
    damaged[99] ^= 4
    file.write_bytes(damaged)
    with pytest.raises(DataError, match="array 'planted/features', chunk 0 is damaged"):
        cache.planted_features()


def test_impossible_sizes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mean_active=0"):
        build(tmp_path / "c", **SIZES | {"mean_active": 0}, seed=0)  # type: ignore[arg-type]
