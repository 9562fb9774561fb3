"""W&B gets each step once, however often a run was broken."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsepilot.errors import ConfigError
from sparsepilot.reporting import wandb as ours
from sparsepilot.rows import RowFile, read_rows
from sparsepilot.run_folder import RunFolder, write_json


def logged_rows(offline_run: Path) -> list[dict[str, Any]]:
    """The history of an offline run, read from its file: a LevelDB log of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    content = offline_run.read_bytes()
    place, record, rows = 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
    return rows


def test_an_offline_run_holds_each_step_once_after_three_breaks(train_tiny, tmp_path: Path) -> None:
    for samples in (2560, 5120, 7680):
        train_tiny(f"samples={samples}", "logger=wandb", "logger.wandb.mode=offline")
    found = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 1
    rows = logged_rows(found[0])
    truth = list(ours.by_step(read_rows(tmp_path / "run" / "metrics.jsonl"), after_step=0))
    assert [row["samples"] for row in rows] == [row["samples"] for row in truth]
    assert len({row["samples"] for row in rows}) == len(rows) == 30
    for row, true in zip(rows, truth, strict=True):
        assert row["train/loss"] == true["train/loss"]
        assert row.get("val/fvu") == true.get("val/fvu")


def test_the_pictures_of_the_report_are_in_the_offline_run(train_tiny, tmp_path: Path) -> None:
    for samples in (2560, 5120):  # the second goes on with the first, and draws it anew
        train_tiny(f"samples={samples}", "logger=wandb", "logger.wandb.mode=offline", "report=true")
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (found,) = run.glob("*.wandb")
    rows = logged_rows(found)
    assert [row["step"] for row in rows if "step" in row] == list(range(1, 21))
    (last,) = (row for row in rows if "report/l0/path" in row)
    assert (last["samples"], last["step"]) == (5120, 20)  # beside the last row, on the axis of samples
    pictures = {path.stem: path for path in (tmp_path / "run" / "report").glob("*.png")}
    assert {"l0", "loss", "control", "dead_latents", "learning_rate"} <= set(pictures)
    for name, path in pictures.items():
        assert last[f"report/{name}/_type"] == "image-file"
        assert (run / "files" / last[f"report/{name}/path"]).read_bytes() == path.read_bytes()


def test_pictures_of_an_earlier_end_are_not_sent(tmp_path: Path) -> None:
    from PIL import Image

    folder = RunFolder(tmp_path)
    sent: list[dict[str, Any]] = []
    run = SimpleNamespace(step=0, log=lambda row, step: sent.append(row))
    folder.metrics.write_text('{"step": 3, "samples": 30}\n')
    folder.report.mkdir()
    for name, age_s in (("old", 1), ("new", -1)):
        path = folder.report / f"{name}.png"
        Image.new("L", (1, 1)).save(path)
        when = folder.metrics.stat().st_mtime_ns - age_s * 10**9
        os.utime(path, ns=(when, when))
    ours.send_pictures(run, folder)
    assert [sorted(row) for row in sent] == [["report/new", "samples"]]


class FakeServerRun:
    """What W&B's client shows of a run: steps that it has, and a log that refuses to go back."""

    def __init__(self, server: dict[int, dict[str, Any]]) -> None:
        self.server = server
        self.step = max(server, default=-1) + 1
        self.summary = {"step": max(server)} if server else {}

    def log(self, row: dict[str, Any], step: int) -> None:
        assert step not in self.server, f"step {step} was sent twice"
        self.server[step] = row

    def finish(self) -> None:
        pass


def test_an_online_run_gets_what_checkpoints_cover_and_nothing_twice(tmp_path: Path, monkeypatch) -> None:
    folder, server = RunFolder(tmp_path), {}
    monkeypatch.setattr(ours, "begin", lambda *args: FakeServerRun(server))

    def rows(file: RowFile, steps: range, attempt: int) -> None:
        for step in steps:
            file.append({"step": step, "samples": 10 * step, "attempt": attempt})

    file = RowFile(folder.metrics, samples=0)
    live = ours.LiveRun(folder, {})
    rows(file, range(1, 6), attempt=1)
    assert server == {}  # no checkpoint covers them yet
    live.after_checkpoint(50)
    rows(file, range(6, 9), attempt=1)
    file.close()  # killed: rows 6 to 8 are past the checkpoint

    file = RowFile(folder.metrics, samples=50)
    live = ours.LiveRun(folder, {})
    rows(file, range(6, 11), attempt=2)
    live.after_checkpoint(100)
    live.after_checkpoint(100)
    file.close()
    assert [server[step]["attempt"] for step in sorted(server)] == [1] * 5 + [2] * 5


def test_an_online_run_that_does_not_close_is_a_warning(tmp_path: Path, monkeypatch) -> None:
    """`close` stands where a run ends, after a stop that was saved too: an error there would be the run's own."""

    def fail() -> None:
        raise ConnectionError("the server is gone")

    said: list[str] = []
    run = SimpleNamespace(summary={}, step=0, finish=fail)
    monkeypatch.setattr(ours, "begin", lambda *args: run)
    copy = ours.WandbCopy(RunFolder(tmp_path), {"mode": "online"}, said.append)
    copy.begin()
    copy.close()
    assert [line.partition(";")[0] for line in said] == ["warning: W&B: the server is gone"]


def test_mode(monkeypatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert ours.resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert ours.resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert ours.resolve_mode("auto") == "disabled"
    assert ours.resolve_mode("offline") == "offline"
    with pytest.raises(ConfigError, match=r"logger.wandb.mode = onlin: should be one of"):
        ours.resolve_mode("onlin")


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "samp'])
def test_rows_are_cut_back_and_a_torn_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "samples": 200_000_001 + i, "x": 0.1 + i}) + "\n" for i in range(5)]
    path.write_bytes("".join(lines).encode() + torn)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    file = RowFile(path, samples=200_000_003)
    file.append({"step": 7, "samples": 200_000_008})
    file.close()
    assert path.read_text() == "".join(lines[:3]) + '{"step": 7, "samples": 200000008}\n'


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": SimpleNamespace()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_sample_of_features_is_a_table_of_the_run(train_tiny, tmp_path: Path) -> None:
    train_tiny("logger=wandb", "logger.wandb.mode=disabled")
    folder = RunFolder(tmp_path / "run")
    latents = [{"latent": 7, "score": 0.5, "contexts": "a [[b]]"}, {"latent": 3, "score": None, "contexts": ""}]
    folder.features.mkdir()
    write_json(folder.features / "sample.json", latents)
    ours.write_offline_run(folder, {"project": "p", "entity": None, "group": None, "tags": []})
    (run,) = folder.path.glob("wandb/offline-run-*")
    (found,) = run.glob("*.wandb")
    (row,) = (row for row in logged_rows(found) if "features/sample/path" in row)
    assert (row["features/sample/_type"], row["samples"]) == ("table-file", 5120)
    table = json.loads((run / "files" / row["features/sample/path"]).read_text())
    assert table["columns"] == ["latent", "score", "contexts"]
    assert table["data"] == [[7, 0.5, "a [[b]]"], [3, None, ""]]
