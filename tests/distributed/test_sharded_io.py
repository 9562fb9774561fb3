"""A sharded checkpoint: any mesh writes it, any other reads it, and a damaged, half-written or foreign one is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from spreading import WHOLE
from warm import Warm

from sparsepilot.callbacks.checkpoint_io import CrashSafeIO, is_whole
from sparsepilot.callbacks.sealed_file import read_sealed, write_sealed
from sparsepilot.callbacks.sharded_io import INDEX, remove
from sparsepilot.errors import CheckpointError

pytestmark = pytest.mark.slow  # four processes
SCRIPT = "tests/distributed/spreading.py"


@pytest.fixture(scope="module")
def saved(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By four ranks."""
    path = tmp_path_factory.mktemp("saved") / "samples-000000000007.ckpt"
    for ended in warm.ranks(4, [SCRIPT, "save", str(path)], {}):
        assert ended.code == 0, ended.out
    return path


def test_one_process_reads_what_four_have_saved(saved: Path) -> None:
    assert is_whole(saved)
    loaded = CrashSafeIO().load_checkpoint(saved)
    assert loaded["spread"].keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert torch.equal(loaded["spread"][name], tensor), name
        assert loaded["spread"][name].dtype == tensor.dtype
    assert (loaded["step"], loaded["groups"]) == (7, [{"betas": (0.9, None)}])
    numbers = [t.numel() for file in saved.glob("rank-*.ckpt") for t in read_sealed(file).values()]
    assert sum(numbers) == sum(t.numel() for name, t in WHOLE.items() if name != "everywhere")  # nothing twice


@pytest.mark.parametrize("world", [2, 3])
def test_other_numbers_of_ranks_read_it(warm: Warm, saved: Path, world: int) -> None:
    for ended in warm.ranks(world, [SCRIPT, "load", str(saved)], {}):
        assert ended.code == 0, ended.out


def test_every_byte_counts(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / saved.name
    shutil.copytree(saved, copy)
    for file in sorted(copy.iterdir()):
        data = file.read_bytes()
        for place in range(0, len(data), 97):
            file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            assert not is_whole(copy), (file.name, place)
        file.write_bytes(data[:-1])
        assert not is_whole(copy), file.name
        file.unlink()
        assert not is_whole(copy), file.name
        file.write_bytes(data)
        assert is_whole(copy)


def test_a_part_of_another_checkpoint_does_not_pass(saved: Path, tmp_path: Path) -> None:
    """Sealed and whole by itself, but not the file that the index names."""
    copy = tmp_path / saved.name
    shutil.copytree(saved, copy)
    part = read_sealed(copy / "rank-00002.ckpt")
    write_sealed(copy / "rank-00002.ckpt", {name: tensor * 0 for name, tensor in part.items()}, "")
    assert not is_whole(copy)
    index = read_sealed(copy / INDEX)
    index["parts"]["spread/rows"].pop()
    write_sealed(copy / INDEX, index, "")
    with pytest.raises(CheckpointError, match="holds 8 of 14 numbers of spread/rows"):
        CrashSafeIO().load_checkpoint(copy)


class Stranger:
    """Runs code where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_checkpoint_from_a_stranger_cannot_run_code(saved: Path, tmp_path: Path) -> None:
    copy, trace = tmp_path / saved.name, tmp_path / "trace"
    shutil.copytree(saved, copy)
    write_sealed(copy / INDEX, {"files": {}, "parts": {}, "rest": Stranger(trace)}, "")
    assert not is_whole(copy)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        CrashSafeIO().load_checkpoint(copy)
    assert not trace.exists()


def test_removing_one_takes_its_name_first(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / saved.name
    shutil.copytree(saved, copy)
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((path.name, copy.exists())))
    remove(copy)
    assert seen[-1] == (copy.name + ".old.tmp", False)
