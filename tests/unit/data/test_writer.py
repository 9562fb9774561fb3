"""The writer: what it refuses, what survives a kill or a full disk, and that nobody can tell who wrote what."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_cache
import torch
from warm import Warm

from sparsepilot.data.cache import Cache
from sparsepilot.data.files import one_at_a_time
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create, seal
from sparsepilot.errors import ConfigError, DataError

SITE, SMALL = tiny_cache.WIDTHS


def spawn(path: Path, rank: int, world: int, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, tiny_cache.__file__, str(path), str(rank), str(world), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def content(path: Path) -> dict[str, bytes]:
    """Every file of a cache by its relative name."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache.sealed(tmp_path_factory.mktemp("cache") / "unbroken").path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: str) -> None:
    tiny_cache.sealed(tmp_path / "c", dtype)
    cache = Cache(tmp_path / "c")
    for site, width in tiny_cache.WIDTHS.items():
        true = tiny_cache.rows_of(site, range(830), width)
        stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
        for start, stop in [(0, 830), (0, 1), (31, 33), (120, 300), (699, 701), (829, 830), (50, 50)]:
            read = cache.read(site, start, stop)
            assert read.dtype == stored
            if dtype == "int8":
                limit = true[start:stop].abs().amax(dim=1, keepdim=True) / 127 / 2 + 1e-6 if stop > start else 0
                assert ((read - true[start:stop]).abs() <= limit).all()
            else:
                assert torch.equal(read, true[start:stop].to(stored))
        train = cache.read(site, 0, 700).double()  # statistics are of what is read back, training rows only
        stats = cache.stats(site)
        torch.testing.assert_close(stats.mean_D.double(), train.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.variance_D.double(), train.var(0, correction=0), rtol=1e-5, atol=1e-6)
        assert stats.mean_sq_norm == pytest.approx(float(train.square().sum(1).mean()), rel=1e-12)
        assert stats.scale**2 * stats.mean_sq_norm == pytest.approx(width)
    numbers = np.arange(100, 830)
    assert (cache.tokens(100, 830) == numbers % 50).all()
    assert (cache.positions(100, 830) == numbers % 16).all()
    assert (cache.documents(100, 830) == numbers // 16).all()


def test_any_number_of_processes_give_the_same_files(tmp_path: Path, unbroken: Path) -> None:
    """Three real processes create and write at once; a different number of them would have done as well."""
    path = tmp_path / "c"
    writers = [spawn(path, rank, 3) for rank in range(3)]
    said = [w.communicate()[1] for w in writers]
    assert [w.returncode for w in writers] == [0, 0, 0], said
    assert seal(path).fingerprint == Cache(unbroken).fingerprint
    assert content(path) == content(unbroken)


# Each shard passes the point six times: after each of its five arrays (before the rename), and before its marker.
@pytest.mark.parametrize("nth", [1, 4, 6, 15, 42])
def test_a_killed_writer_goes_on_where_it_was(warm: Warm, tmp_path: Path, unbroken: Path, nth: int) -> None:
    path = tmp_path / "c"
    killed = warm.script([tiny_cache.__file__, str(path), "0", "1"], SPARSEPILOT_FAULT=f"cache-shard-write:{nth}")
    assert killed.returncode == -signal.SIGKILL
    whole = (nth - 1) // 6
    assert [r.start for r in CacheWriter(path).pending()] == list(range(whole * 128, 830, 128))
    with pytest.raises(DataError, match=f"unfinished, {7 - whole} of 7 shards are missing"):
        Cache(path)
    with pytest.raises(DataError, match=f"{7 - whole} of 7 shards are missing, the first at row {whole * 128}"):
        seal(path)
    tiny_cache.write(path, tiny_cache.plan(), rank=1, world=2)  # resumed by two writers instead of one
    tiny_cache.write(path, tiny_cache.plan(), rank=0, world=2)
    assert seal(path).fingerprint == Cache(unbroken).fingerprint
    assert content(path) == content(unbroken)  # no temporary file is left either


def test_a_full_disk_loses_nothing_that_was_whole(tmp_path: Path, unbroken: Path) -> None:
    """The file-size limit of a real process stands for the disk: writes fail with a real OSError half-way in."""
    path = tmp_path / "c"
    process = spawn(path, 0, 1, "--full-after", "3")
    _, stderr = process.communicate()
    assert process.returncode == 1
    line = stderr.strip().splitlines()[-1]
    assert "DataError" in line
    assert "cannot write shard 3 (rows 384 to 511)" in line
    assert "File too large; 3 of 7 shards are whole and stay" in line
    assert not list(path.rglob("*.partial"))
    assert len(CacheWriter(path).pending()) == 4
    tiny_cache.write(path, tiny_cache.plan())
    assert seal(path).fingerprint == Cache(unbroken).fingerprint
    assert content(path) == content(unbroken)


def test_left_over_files_of_a_dead_writer_do_not_leak_into_a_shard(tmp_path: Path, unbroken: Path) -> None:
    path = tmp_path / "c"
    tiny_cache.write(path, tiny_cache.plan())
    damaged = path / "data.zarr/activations" / SITE / "c/6/0"  # the short last shard: zarr would merge into it
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    (path / "done/00000006.json").unlink()
    (path / "done/00000002.json").write_text('{"content": {"shard": 2')  # a torn marker vouches for nothing
    assert [r.start for r in CacheWriter(path).pending()] == [256, 768]
    tiny_cache.write(path, tiny_cache.plan())
    seal(path)
    assert content(path) == content(unbroken)


def test_two_that_write_one_shard_leave_each_others_files_alone(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one stands before a rename, its bytes under a temporary name, when the second one comes there."""
    path = tmp_path / "c"
    create(path, tiny_cache.plan())
    first, second, late = CacheWriter(path), CacheWriter(path), CacheWriter(path)
    stale = late.pending()
    begun, waits, go_on = threading.Event(), threading.Event(), threading.Event()

    def pause(name: str) -> None:
        begun.set()
        assert go_on.wait(30)

    wrote: list[int] = []

    def write_all(writer: CacheWriter) -> None:
        for rows in writer.shares(waits.set):
            tiny_cache.write_one(writer, rows)
            wrote.append(rows.start)

    monkeypatch.setattr("sparsepilot.faults.point", pause)
    threads = [threading.Thread(target=write_all, args=(writer,)) for writer in (first, second)]
    threads[0].start()
    assert begun.wait(30)
    (partial,) = path.rglob("*.partial")
    threads[1].start()
    assert waits.wait(30)
    assert partial.exists()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert sorted(wrote) == list(range(0, 830, 128))  # none of them twice
    assert second.finish() is not None
    assert content(path) == content(unbroken)
    files = {file: file.stat().st_ino for file in path.rglob("*")}
    tiny_cache.write_one(late, stale[0])  # it had looked before the others wrote and sealed
    assert list(late.shares()) == []
    assert {file: file.stat().st_ino for file in path.rglob("*")} == files


def test_only_the_shards_of_other_writers_are_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tiny_cache.write(path, tiny_cache.plan(), rank=1, world=2)
    assert CacheWriter(path, 1, 2).finish() is None
    with pytest.raises(DataError, match="4 of 7 shards are missing"):
        CacheWriter(path, 0, 2).finish()  # its own
    tiny_cache.write(path, tiny_cache.plan(), rank=0, world=2)
    last = CacheWriter(path, 0, 2)
    plan = (path / "plan.json").read_bytes()
    (path / "plan.json").write_bytes(plan.replace(b'"float16"', b'"float32"').replace(b"128", b"256"))
    with pytest.raises(DataError, match="plan.json: damaged"):
        last.finish()
    (path / "plan.json").write_bytes(plan)
    assert last.finish() is not None


def test_sealing_twice_and_creating_twice_change_nothing(tmp_path: Path) -> None:
    path = tiny_cache.sealed(tmp_path / "c").path
    before = content(path)
    create(path, tiny_cache.plan())
    assert CacheWriter(path).pending() == []
    seal(path)
    assert content(path) == before


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("dtype", {"dtype": "float16"}),
        ("num_val_rows", {"num_val_rows": 131}),
        ("source", {"source": {"kind": "else"}}),
    ],
)
def test_another_plan_at_the_same_path(tmp_path: Path, field: str, other: dict[str, object]) -> None:
    create(tmp_path / "c", tiny_cache.plan())
    with pytest.raises(DataError, match=f"holds another cache: {field} is .* there and .* here"):
        create(tmp_path / "c", tiny_cache.plan(**other))  # type: ignore[arg-type]


def test_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="is no activation cache; choose an empty or a new folder"):
        create(tmp_path, tiny_cache.plan())
    with pytest.raises(DataError, match="no activation cache here"):
        CacheWriter(tmp_path)


def test_bad_rows_are_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    create(tmp_path / "c", tiny_cache.plan())
    writer = CacheWriter(tmp_path / "c")
    rows = writer.pending()[1]
    numbers = np.arange(128)

    def write(rows: range = rows, tokens: np.ndarray = numbers, **changed: torch.Tensor) -> None:
        x = {site: tiny_cache.rows_of(site, rows, w).bfloat16() for site, w in tiny_cache.WIDTHS.items()}
        writer.write_shard(rows, x | changed, tokens, numbers, numbers)

    good = tiny_cache.rows_of(SITE, rows, 24).bfloat16()
    nan, inf = good.clone(), good.clone()
    nan[5, 3], inf[7, 0] = float("nan"), -float("inf")
    for bad, message in [
        (nan, "site 'model.layers.1': row 133 holds NaN or infinite values"),
        (inf, "site 'model.layers.1': row 135 holds NaN or infinite values"),
        (good[:, :23], r"rows have shape \[128, 23\], this shard takes \[128, 24\]"),
        (good[:127], r"rows have shape \[127, 24\], this shard takes \[128, 24\]"),
        (good.float(), "rows are torch.float32, this cache takes bfloat16"),
    ]:
        with pytest.raises(DataError, match=message):
            write(**{SITE: bad})
    with pytest.raises(DataError, match=r"site 'model.layers.2' is not in this cache; did you mean"):
        write(**{"model.layers.2": good})
    with pytest.raises(DataError, match=r"site 'model\.layers\.1' is missing from rows 128 to 255"):
        writer.write_shard(rows, {SMALL: good[:, :8]}, numbers, numbers, numbers)
    with pytest.raises(DataError, match="rows 0 to 256 are no whole shard"):
        write(rows=range(256))
    with pytest.raises(DataError, match="tokens: values from -1 to 126"):
        write(tokens=numbers - 1)
    with pytest.raises(DataError, match=r"tokens: shape \[127\]"):
        write(tokens=numbers[1:])
    assert not list((tmp_path / "c" / "data.zarr").rglob("c"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat"}, "dtype='bfloat' cannot be stored; did you mean 'bfloat16'"),
        ({"shard_rows": 100}, "shard_rows=100 is not a multiple of chunk_rows=32"),
        ({"num_train_rows": 0}, "num_train_rows=0; at least 1"),
        ({"chunk_rows": 2**26, "shard_rows": 2**26}, "makes chunks of 3221225472 bytes; at most 1 GiB"),
        ({"source": {"x": float("nan")}}, "is not JSON"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_cache.plan(**change)  # type: ignore[arg-type]


def test_default_sizes_go_by_bytes() -> None:
    plan = CachePlan(10**9, 0, {"a": 576}, "bfloat16")
    assert (plan.chunk_rows, plan.shard_rows) == (256, 65536)
    plan = CachePlan(10**9, 0, {f"layers.{i}": 8192 for i in range(30)}, "float32")
    assert (plan.chunk_rows, plan.shard_rows) == (16, 128)


def test_of_two_that_want_to_make_a_cache_one_waits(tmp_path: Path) -> None:
    order, begun, waits = [], threading.Event(), threading.Event()

    def second() -> None:
        begun.wait()
        with one_at_a_time(tmp_path / "new" / "cache", waits.set):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with one_at_a_time(tmp_path / "new" / "cache", lambda: order.append("should not wait")):
        begun.set()
        assert waits.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
