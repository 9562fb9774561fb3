"""Sweeps: members that fail, the record of all of them, what a report makes of it, and what cannot be started."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from warm import Warm

from sparsepilot import ranks
from sparsepilot.config import cli
from sparsepilot.config.check import check
from sparsepilot.config.resolvers import register_resolvers
from sparsepilot.config.schema import register
from sparsepilot.config.sweeping import Record
from sparsepilot.errors import ConfigError
from sparsepilot.reporting.figure import Panel
from sparsepilot.reporting.runs import Run
from sparsepilot.reporting.sweep import (
    Row,
    joined,
    member_name,
    members_table,
    read_sweep,
    write_sweep_report,
    write_table,
)
from sparsepilot.sweep_folder import Member, Place, SweepFolder

TRAIN = str(ROOT / "train.py")


def start(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """train.py in `folder`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    command = [sys.executable, TRAIN, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [file.stem for file in sorted((ROOT / "conf" / "sweep").glob("*.yaml"))])
def test_every_member_of_every_sweep_passes(compose_cfg, name: str) -> None:
    register()
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[f"sweep={name}"], return_hydra_config=True)
    params = [f"{field}={values}" for field, values in cfg.hydra.sweeper.params.items()]
    swept = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        for o in OverridesParser.create().parse_overrides(params)
    ]
    members = list(itertools.product(*swept))
    assert len(members) > 2
    for words in (members[0], members[-1]):
        check(compose_cfg(f"sweep={name}", *words))


@pytest.mark.slow  # a process that trains two runs
def test_a_member_that_fails_does_not_stop_the_others(warm: Warm, tmp_path: Path) -> None:
    wandb = ("logger=wandb", "logger.wandb.mode=disabled")
    own = [f"data.path={tmp_path}/cache", "model.k=9000,6,2", "hydra.sweep.dir=runs/sweeps/mine"]
    done = warm.script([TRAIN, "-m", *TINY, *wandb, *own], tmp_path)
    error = "model.k = 9000: at most model.d_sae = 64 latents can be active"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {error}", f"failed: member 0 (model.k=9000): {error}"]
    assert "sweep runs/sweeps/mine: 2 of 3 members are done" in done.stdout

    sweep = SweepFolder(tmp_path / "runs" / "sweeps" / "mine")
    assert [(m.status, m.error) for m in sweep.members()] == [("failed", error), ("done", None), ("done", None)]
    config = OmegaConf.load(sweep.path / "2" / "config.yaml")
    assert config.logger.wandb.group == "mine"
    assert (config.run_dir, config.model.k) == ("runs/sweeps/mine/2", 2)

    page = write_sweep_report(sweep, sweep.report).read_text(encoding="utf-8")
    assert error in page
    assert page.count("model.k") >= 1
    with open(sweep.report / "members.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["model.k"] for row in table] == ["9000", "6", "2"]
    assert [row["status"] for row in table] == ["failed", "done", "done"]
    assert [row["starts"] for row in table] == ["0", "1", "1"]
    last = json.loads((sweep.path / "1" / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert float(table[1]["fvu"]) == last["val/fvu"]
    assert float(table[1]["l0"]) == last["val/l0"] == 6
    assert int(table[1]["dead_latents"]) == last["train/dead_latents"]
    assert float(table[1]["samples_per_s"]) > 0


def write_member(sweep: SweepFolder, number: int, fvu: float | None, *words: str) -> None:
    """A member that has ended at a target of L0, or, without `fvu`, has not begun."""
    sweep.write(Member(number, ["sweep=x", *words], str(sweep.path / str(number)), "done" if fvu else "waiting"))
    if fvu:
        folder = sweep.path / str(number)
        folder.mkdir()
        model = {"_target_": "sparsepilot.autoencoders.topk.TopK", "d_sae": 64, "k": 8}
        OmegaConf.save({"model": model, "data": {}, "batch": 8, "samples": 80, "seed": 0}, folder / "config.yaml")
        l0 = float(dict(word.split("=") for word in words)["controller.target_l0"])
        row = {"step": 10, "samples": 80, "val/l0": l0, "val/fvu": fvu}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def test_members_that_differ_in_sparsity_alone_lie_on_one_line(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    ends = {(0, 32): 0.1, (0, 8): 0.3, (1, 8): 0.31, (1, 32): None, (0, 16): 0.2, (1, 16): 0.21}
    for number, ((seed, l0), fvu) in enumerate(ends.items()):
        write_member(sweep, number, fvu, f"seed={seed}", f"controller.target_l0={l0}")
    rows = read_sweep(sweep)
    table = members_table(rows)
    assert table.head == ["member", "seed", "controller.target_l0", "L0", "FVU", "samples", "status"]
    assert table.runs == [0, 1, 2, None, 3, 4]
    assert list(table.rows[3]) == ["3", "1", "32", "-", "-", "-", "waiting"]

    panel = frontier(rows)
    lines = {line.name: (list(line.x), list(line.y)) for line in panel.lines if line.run < 0}
    assert lines == {"seed=0": ([8, 16, 32], [0.3, 0.2, 0.1]), "seed=1": ([8, 16], [0.31, 0.21])}
    assert sum(line.role == "validation" for line in panel.lines) == 5


def frontier(rows: Sequence[Row]) -> Panel:
    """FVU over L0 of a sweep's members."""
    from sparsepilot.reporting.report import draw_pictures

    runs = [row.run for row in rows if row.run]
    picture = next(p for p in draw_pictures(runs, [run.name for run in runs]) if p.name == "frontier")
    return joined(picture, rows).panels[0]


@pytest.mark.parametrize("field", ["model.coefficient", "+model.k", "++model.target_l0"])
def test_each_trainee_of_a_sweep_has_a_line(field: str) -> None:
    """Whichever field makes the members sparser, and however it was written; one that collapsed has no point on it."""
    config = {"model": {"d_sae": 64, "k": 8}, "data": {}, "batch": 8, "samples": 80}
    ends = {("narrow", 8): 0.3, ("wide", 8): 0.2, ("narrow", 16): 0.15, ("wide", 16): 0.1, ("narrow", 0): 1.0}
    rows = []
    for number, ((trainee, l0), fvu) in enumerate(ends.items()):
        row = {"step": 10, "samples": 80, "val/l0": float(l0), "val/fvu": fvu}
        member = Member(number, [], "", "done")
        rows.append(Row(member, [f"{field}={l0}", "+seed=0"], Run(str(number), config, [row], trainee=trainee), 1))
    panel = frontier(rows)
    lines = {line.name: (list(line.x), list(line.y)) for line in panel.lines if line.run < 0}
    assert lines == {"+seed=0, narrow": ([8, 16], [0.3, 0.15]), "+seed=0, wide": ([8, 16], [0.2, 0.1])}
    assert panel.notes == ["4 of 5 runs have this"]


def test_a_member_lies_where_it_was_trained(train_tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks the one that claims a folder tells; the process that has started them knows what was asked."""
    sweep, asked = SweepFolder(tmp_path / "sweep"), tmp_path / "sweep" / "0"
    place = Place(str(sweep.path), 0)
    monkeypatch.setattr("sparsepilot.sweep_folder.told_place", [place])
    for samples in (1024, 2048):
        sweep.write(Member(0, ["resume=never"], str(asked), "running"))
        train_tiny(f"run_dir={asked}", "resume=never", f"samples={samples}")
    Record(place).done()
    assert sweep.member(0) == Member(0, ["resume=never"], f"{asked}-2", "done")
    (row,) = read_sweep(sweep)
    assert row.run is not None
    assert row.run.last("samples") == 2048


def test_trainees_of_a_member_are_told_apart(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    write_member(sweep, 0, 0.1, "controller.target_l0=8")
    folder = sweep.path / "0"
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"trainees": {"one": {}, "two": {}}}), folder / "config.yaml")
    row = {"step": 10, "samples": 80} | {f"{name}/val/{key}": 0.5 for name in ("one", "two") for key in ("l0", "fvu")}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows = read_sweep(sweep)
    names = [member_name(row) for row in rows]
    assert names == ["0: sweep=x, target_l0=8, one", "0: sweep=x, target_l0=8, two"]
    table = members_table(rows)
    assert table.head[:2] == ["member", "trainee"]
    assert [list(cells[:2]) for cells in table.rows] == [["0", "one"], ["0", "two"]]
    write_table(rows, tmp_path / "members.csv")
    with open(tmp_path / "members.csv", encoding="utf-8") as file:
        assert [line["trainee"] for line in csv.DictReader(file)] == ["one", "two"]


def test_no_sweep_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no sweep here"):
        read_sweep(SweepFolder(tmp_path / "nothing"))


@pytest.mark.slow  # two processes that import Hydra
def test_a_sweep_on_a_cluster_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "submitit").mkdir()
    (tmp_path / "submitit" / "__init__.py").write_text("raise ImportError('not installed')")
    words = ("-m", "hydra/launcher=slurm", "seed=0,1")
    done = start(tmp_path, *words, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}/src")
    assert (done.returncode, done.stderr) == (
        2,
        "error: hydra/launcher = slurm: submitit is not installed; pip install -c constraints.txt -e '.[slurm]'\n",
    )
    assert not (tmp_path / "runs").exists()
    pytest.importorskip("submitit")
    (tmp_path / "submitit" / "__init__.py").unlink()
    (tmp_path / "submitit").rmdir()
    done = start(tmp_path, *words, PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: hydra/launcher = slurm: the members could not be submitted: ")
    assert "slurm" in done.stderr.split(":", 3)[3]
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_somebody_else_has_started_do_not_sweep(warm: Warm, tmp_path: Path, rank: str) -> None:
    """Rank 1 says it, too, as nobody here ends it once rank 0 has."""
    done = warm.script([TRAIN, "-m", "seed=0,1"], tmp_path, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
    assert done.returncode == 2
    said = "error: -m: this process is one of several that srun or torchrun has started, and a sweep is started by one;"
    assert done.stderr.startswith(said)


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_an_error_of_one_rank_ends_its_member_and_not_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_tasks: int
) -> None:
    """A job of submitit with a task for each rank: srun ends the others where one of them fails."""
    SweepFolder(tmp_path).write(Member(0, [], str(tmp_path / "0"), "running"))
    environment = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(num_tasks),
                   "SLURM_PROCID": str(num_tasks - 1), "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "prepared", [True])
    monkeypatch.setattr(cli, "place_here", lambda: Place(str(tmp_path), 0))
    monkeypatch.setattr(Record, "begin", lambda self, cfg: None)
    monkeypatch.setattr(ranks, "may_say", [lambda line: True])
    with pytest.raises(SystemExit) if num_tasks > 1 else contextlib.nullcontext(), cli.one_run(OmegaConf.create({})):
        raise ConfigError("this rank's disk is full")
    assert SweepFolder(tmp_path).member(0).error == "this rank's disk is full"
    assert capsys.readouterr().err == "error: this rank's disk is full\n"
