"""Run folders in the situations that users bring about: finished, damaged, locked, exported, beside other loggers."""

from __future__ import annotations

import csv
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from documented import documented

import sparsepilot
from sparsepilot.callbacks.checkpoint_io import is_whole, list_checkpoints
from sparsepilot.claim import Claim, claim, record_start
from sparsepilot.config.plain import plain_values
from sparsepilot.data.cache import Cache
from sparsepilot.errors import CheckpointError, ConfigError, SparsepilotError
from sparsepilot.interop.dictionary import OWN_TENSORS
from sparsepilot.reporting.runs import read_runs
from sparsepilot.rows import read_rows
from sparsepilot.run_folder import RunFolder


def models() -> list[str]:
    return sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml"))


def controllers() -> list[str]:
    return sorted(file.stem for file in (ROOT / "conf" / "controller").glob("*.yaml"))


NAMED = {
    "pareto": ("controller.targets=[16,15]", "optimizer.lr=4e-3"),  # a step that thresholds can make in so few
    "constrained": ("controller.target=0.99",),
}
"""What a yaml's own values are too large for here, or too near for four steps."""
BLOCKS = {
    "autoencoder": ("model.sites=[b]",),
    "crosscoder": (),
    "transcoder": ("model.sites={read:[a,b],write:[c]}",),
    "transcoder with a skip": ("model.sites={read:[a],write:[c,b]}", "model.skip=true"),
    "cross_layer_transcoder": ("model.sites={read:[a,b,c],write:[a,b,c],cross_layer:true}",),
}


def pairs() -> list[tuple[str, str, str]]:
    """Every model with every controller and, as long as there are at least as many controllers as kinds of blocks (and
    models, for controllers), each of them with every kind of blocks: a Latin square, a fifth of all triples."""
    names = list(BLOCKS)
    return [
        (model, controller, names[(i + j) % len(names)])
        for i, model in enumerate(models())
        for j, controller in enumerate(controllers())
    ]


def test_pairs_leave_none_out() -> None:
    assert {(model, blocks) for model, _, blocks in pairs()} == {(m, b) for m in models() for b in BLOCKS}
    assert {(controller, blocks) for _, controller, blocks in pairs()} == {
        (c, b) for c in controllers() for b in BLOCKS
    }


@pytest.mark.filterwarnings("ignore:.*is not met by any L0 so far.*")  # four steps are too few to meet any FVU
@pytest.mark.parametrize(("model", "controller", "blocks"), pairs())
def test_every_model_trains_under_every_controller_and_on_all_blocks(
    train_sites, three_sites: Path, tmp_path: Path, model: str, controller: str, blocks: str
) -> None:
    """The contract: a new file in conf/model or conf/controller is tested without an edit here."""
    summary = train_sites(f"model={model}", f"controller={controller}", *NAMED.get(controller, ()), *BLOCKS[blocks])
    metrics = summary["metrics"]
    assert summary["samples"] == 1024
    assert metrics["train/loss"] > 0
    assert 0 < metrics["val/fvu"] < 5  # four steps: a transcoder is still worse than the mean
    saved = sparsepilot.load(tmp_path / "run")
    assert saved.cfg["blocks"] == blocks.removesuffix(" with a skip")
    read, write = saved.cfg["sites"], saved.cfg["sites_out"]
    assert read == {"autoencoder": ["b"], "transcoder": ["a", "b"], "transcoder with a skip": ["a"]}.get(
        blocks, [*"abc"]
    )
    assert write == {"autoencoder": ["b"], "transcoder": ["c"], "transcoder with a skip": ["c", "b"]}.get(
        blocks, [*"abc"]
    )
    # the exported dictionary, fed with raw rows, does what validation measured
    cache = Cache(three_sites)
    x_BD, y_BD = (torch.cat([cache.read(site, 3000, 3500) for site in side], dim=1) for side in (read, write))
    with torch.no_grad():
        sq_error_D = (y_BD - saved(x_BD)).square().mean(0)
        l0 = float((saved.encode(x_BD) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(metrics["val/l0"], rel=2e-3)
    assert float(sq_error_D.mean()) == pytest.approx(metrics["val/mse"], rel=1e-3)
    # FVU over several sites weighs each by its scaled variance, so that the largest does not drown the others
    stats = [cache.stats(site) for site in write]
    error = sum(float(part.sum()) * s.scale**2 for part, s in zip(sq_error_D.split(16), stats, strict=True))
    y_mean_D = torch.cat([s.mean_D for s in stats])
    deviation_D = (y_BD - y_mean_D).square().mean(0)
    whole = sum(float(part.sum()) * s.scale**2 for part, s in zip(deviation_D.split(16), stats, strict=True))
    assert error / whole == pytest.approx(metrics["val/fvu"], rel=1e-3)


EVERY_KEY = {
    "top": "{model: {multi_topk: 0.125}}",
    "nested": "{controller: {targets: [8, 4]}}",
    "gated": "{controller: {target: 0.5}}",
    "jump": "{controller: {target_l0: 6}}",
    "relu": "{model: {penalty: p, rescale: true}}",
}
"""Trainees that log all that planted data can, by what is their own beside the options below."""
OPTIONS = (
    *("+model@trainees.nested.model=matryoshka", "+controller@trainees.nested.controller=pareto"),
    *("+model@trainees.gated.model=gated", "+controller@trainees.gated.controller=constrained"),
    *("+model@trainees.jump.model=jumprelu_tanh", "+controller@trainees.jump.controller=l0_target"),
    "+model@trainees.relu.model=relu",
)


@pytest.mark.filterwarnings("ignore:controller.target")  # nothing is met or held in so few steps
def test_every_key_of_a_run_has_its_line_in_the_documentation(train_tiny, tmp_path: Path) -> None:
    """And no line is about a key that no run has; those of a language model: tests/unit/lm/test_cross_entropy.py."""
    summary = train_tiny(*OPTIONS, *(f"++trainees.{name}={own}" for name, own in EVERY_KEY.items()))
    for file in ("metrics.jsonl", "timing.jsonl"):
        logged = {key for row in read_rows(tmp_path / "run" / file) for key in row}
        logged = {key.partition("/")[2] if key.partition("/")[0] in EVERY_KEY else key for key in logged}
        of_language_model = {key for key in documented(file) if key.partition("/")[2].startswith(("ce", "kl"))}
        assert logged == documented(file) - of_language_model
    assert set(summary) == documented("summary.json")


def test_a_cross_layer_transcoder_saves_no_weights_backwards(train_sites, tmp_path: Path) -> None:
    train_sites("model=topk", "model.k=4", "optimizer=muon", *BLOCKS["cross_layer_transcoder"])
    parts = sparsepilot.load(tmp_path / "run").W_dec.detach().view(3, 16, 3, 16)
    assert [[bool(parts[i, :, j].any()) for j in range(3)] for i in range(3)] == [
        [True, True, True], [False, True, True], [False, False, True],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.sites=[d]",), "model.sites: no site 'd' in this cache; known: a, b, c"),
        (("model.sites=[]",), "model.sites = []: names nothing to read"),
        (("model.sites={read:[a],write:[]}",), "a transcoder wants read: [sites] and write: [sites]"),
        (("model.sites={read:[a],write:[x]}",), "model.sites.write: no site 'x' in this cache"),
        (("model.skip=true",), "model.skip = True: only a transcoder has a skip"),
        (("model.sites={read:[a,b],write:[c],cross_layer:true}",), "model.sites.cross_layer = True: reads"),
        ((*BLOCKS["cross_layer_transcoder"], "model.d_sae=47"), "model.d_sae = 47: must be a multiple of 3"),
    ],
)
def test_sites_that_cannot_be(train_sites, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(SparsepilotError) as error:
        train_sites("model.k=4", *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", models())
def test_bf16_trains_every_model_and_keeps_fp32_state(train_sites, tmp_path: Path, model: str) -> None:
    """Field notes, mistake 14: thresholds in bf16 would round updates of 7e-5 away."""
    train_sites(f"model={model}", "trainer.precision=bf16-mixed")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    floats = {
        name: t.dtype
        for name, t in state["state_dict"].items()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    assert {name: dtype for name, dtype in floats.items() if dtype not in (torch.float32, torch.float64)} == {}


def test_the_export_has_the_knob_where_the_controller_left_it(train_tiny, tmp_path: Path) -> None:
    summary = train_tiny("controller.strength=2")
    saved = sparsepilot.load(tmp_path / "run")
    assert summary["metrics"]["val/l0"] <= 2
    assert saved.cfg["k"] == 2
    assert int((saved.encode(torch.randn(20, 16)) > 0).sum(1).max()) <= 2


@pytest.mark.parametrize(
    ("name", "damage", "refused"),
    [
        ("config.yaml", "a: [", "is damaged"),
        ("run.json", '{"id":', "is damaged"),
        ("metrics.jsonl", '{"samples": 5}\n{"samples\n{"samples": 9}\n', "line 2 is damaged"),
        ("timing.jsonl", '{"samples": 5}\n7\n{"samples": 9}\n', "line 2 is 7, no row"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(train_tiny, tmp_path: Path, name: str, damage: str, refused: str) -> None:
    train_tiny()
    file = tmp_path / "run" / name
    file.write_text(damage)
    with pytest.raises(SparsepilotError) as error:
        train_tiny("samples=10240")
    assert f"{file}: {refused}" in str(error.value)
    assert "\n" not in str(error.value)
    assert file.read_text() == damage
    with pytest.raises(SparsepilotError, match=refused):
        read_runs(RunFolder(tmp_path / "run"))


def test_a_hole_behind_what_the_checkpoint_covers_is_cut_off(train_tiny, tmp_path: Path) -> None:
    """What a machine that went down leaves of rows that were not made durable."""
    train_tiny("samples=3072")
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write(b"\0" * 90 + b'7}\n{"step": 14, "samples": 3584, "time": 0.0, "train/loss": 1.0}\n')
    train_tiny()
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[13]["train/loss"] != 1.0
    assert list(read_rows(tmp_path / "run" / "timing.jsonl"))[-1]["samples"] == 5120


def test_two_damaged_checkpoints_are_put_aside_and_the_whole_ones_stay(train_tiny, tmp_path: Path, capsys) -> None:
    options = ("callbacks.checkpoint_every_samples=1024", "callbacks.keep_last=4", "callbacks.keep_best=0")
    train_tiny(*options)
    folder = tmp_path / "run" / "checkpoints"
    for _, path in list_checkpoints(folder)[:2]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    train_tiny(*options[:1], "callbacks.keep_last=2", "callbacks.keep_best=0")
    assert capsys.readouterr().out.count("is damaged; falling back") == 2
    assert [samples for samples, _ in list_checkpoints(folder)] == [5120, 4096]
    assert all(is_whole(path) for _, path in list_checkpoints(folder))
    assert len(list(folder.glob("*.damaged"))) == 2
    assert (folder / "last.ckpt").resolve().name == "samples-000000005120.ckpt"


def test_a_finished_run_started_again_changes_nothing(train_tiny, tmp_path: Path) -> None:
    train_tiny("logger=csv")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "summary.json"}
    summary = train_tiny("logger=csv")
    assert summary["samples"] == 5120
    assert before == {
        p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "summary.json"
    }


@pytest.mark.parametrize("saved", [True, False], ids=["finished", "before the first checkpoint"])
def test_a_cache_of_other_rows_is_refused_before_anything_is_written(train_tiny, tmp_path: Path, saved: bool) -> None:
    """A cache may lie elsewhere when a run goes on, if it is the same one."""
    train_tiny()
    if not saved:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(SparsepilotError, match=rf"^data\.path = {tmp_path}/other: other rows than those that the run"):
        train_tiny(f"data.path={tmp_path}/other", "data.build.seed=1")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert train_tiny(f"data.path={tmp_path}/moved")["samples"] == 5120


def test_a_start_that_was_killed_before_it_wrote_a_configuration_is_no_run(train_tiny, tmp_path: Path) -> None:
    train_tiny("samples=1024")
    left = tmp_path / "left"
    left.mkdir()
    (tmp_path / "run" / "run.json").rename(left / "run.json")
    other = (f"run_dir={left}", f"data.path={tmp_path}/other", "data.build.seed=1")
    train_tiny(*other, "samples=1024")
    assert train_tiny(*other, "samples=2048")["samples"] == 2048


def test_csv_rows_of_an_earlier_process_stay(train_tiny, tmp_path: Path) -> None:
    train_tiny("logger=csv")
    train_tiny("logger=csv", "samples=7680")
    files = sorted((tmp_path / "run" / "csv").glob("*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    steps = [int(float(row["step"])) for row in rows if row["train/loss"]]
    assert sorted(steps) == list(range(1, 31))


def test_never_leaves_the_old_run_alone(train_tiny, tmp_path: Path) -> None:
    train_tiny("logger=csv")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for number in (2, 3):
        train_tiny("logger=csv", "resume=never", "samples=1024")
        fresh = tmp_path / f"run-{number}"
        assert len([row for row in read_rows(fresh / "metrics.jsonl") if "train/loss" in row]) == 4
        assert f"run_dir: {fresh}" in (fresh / "config.yaml").read_text()
        assert (fresh / "csv").is_dir()
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_never_holds_for_a_job_and_not_for_each_of_its_starts(
    train_tiny, compose_cfg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for number in ("", "-2"):  # two runs of one start
        train_tiny("resume=never", "samples=1024")
        assert (tmp_path / f"run{number}").is_dir()
    config = plain_values(compose_cfg(*TINY, f"data.path={tmp_path}/cache", f"run_dir={tmp_path}/run", "samples=1024"))

    def folder(job: str, restarts: str) -> str:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        found = claim(str(tmp_path / "run"), "never", config)
        found.release()
        assert found.goes_on == (found.folder.path.name == "run-2")
        return found.folder.path.name

    assert folder("7", "1") == "run-2"
    assert folder("7", "0") == folder("8", "1") == "run-3"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    train_tiny("resume=never", "samples=1024")
    assert (tmp_path / "run-3").is_dir()
    assert folder("7", "2") == "run-2"  # whatever others have begun meanwhile


def test_one_process_per_run_folder(train_tiny, compose_cfg, tmp_path: Path) -> None:
    train_tiny()
    other = Claim(RunFolder(tmp_path / "run"), goes_on=True)
    other.lock()
    try:
        with pytest.raises(ConfigError, match="another process is training there"):
            train_tiny()
    finally:
        other.release()
    train_tiny()
    config = plain_values(compose_cfg(*TINY, f"data.path={tmp_path}/cache", f"run_dir={tmp_path}/run"))
    claim(str(tmp_path / "run"), "auto", config).release()


def test_a_run_that_another_process_has_begun_meanwhile_is_left_alone(train_tiny, tmp_path: Path) -> None:
    """Both found a fresh folder; one was quick."""
    slow, beside = (claim(str(tmp_path / "run"), resume, {}) for resume in ("auto", "never"))
    train_tiny()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="begun a run there in the meantime; the same line again goes on with it"):
        slow.lock()
    with pytest.raises(ConfigError, match="begun a run there in the meantime; the same line again begins beside it"):
        beside.lock()
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    train_tiny()


@pytest.mark.parametrize("place", ["{file}", "{file}/below", "/proc/nothing/here"])
def test_a_place_where_no_folder_can_be_is_refused_before_data_are_built(
    train_tiny, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    run_dir = place.format(file=tmp_path / "file")
    with pytest.raises(ConfigError, match=rf"^run_dir = {run_dir}: no folder can be made there \(.*\); name another$"):
        train_tiny(f"run_dir={run_dir}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_no_half_of_an_older_configuration(tmp_path: Path) -> None:
    """No file may grow past the limit: the system refuses the write half-way, as it does on a full disk."""
    folder = RunFolder(tmp_path)
    record_start(folder, {"data": {}, "note": "x" * 100_000}, "rows", 0)
    before = folder.config.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="config-1.yaml: the disk is full"):
            record_start(folder, {"data": {}}, "rows", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run.json"}
    record_start(folder, {"data": {}}, "rows", 0)
    assert (tmp_path / "config-1.yaml").read_bytes() == before


def test_a_checkpoint_that_cannot_be_removed_stays_and_the_run_goes_on(
    train_tiny, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr("sparsepilot.callbacks.checkpoint.remove", busy)
    train_tiny("callbacks.checkpoint_every_samples=1024", "callbacks.keep_last=2", "callbacks.keep_best=0")
    saved = [samples for samples, _ in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == [5120, 4096, 3072, 2048, 1024]
    assert "warning: an old checkpoint stays: [Errno 16] Device or resource busy" in capsys.readouterr().out


def test_a_wandb_failure_costs_only_the_copy(train_tiny, tmp_path: Path, capsys) -> None:
    train_tiny("logger=wandb", "logger.wandb.mode=offline", "logger.wandb.project=a/b")
    said = capsys.readouterr().out
    assert "warning: W&B:" in said
    assert "scripts/sync_wandb.py" in said
    assert sparsepilot.load(tmp_path / "run").cfg["k"] == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 5120


def test_a_cache_without_validation_rows_trains(train_tiny) -> None:
    summary = train_tiny("data.build.num_val_rows=0")
    assert summary["metrics"]["train/fvu"] > 0


def test_a_longer_budget_does_not_take_p_annealing_back(train_tiny, tmp_path: Path) -> None:
    words = ("model=relu", "model.penalty=p", "model.p_start_fraction=0.0", "model.coefficient=0.3")
    train_tiny(*words, "samples=2560")
    train_tiny(*words, "samples=10240")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss_sparsity" in row]
    before, after = (rows[i]["train/loss_sparsity"] for i in (9, 10))
    assert rows[10]["samples"] == 2816
    assert 0.7 < after / before < 1.4  # the penalty keeps its size


def test_what_changes_only_the_way_of_computing_may_change_on_resume(train_tiny) -> None:
    train_tiny("samples=2560")
    with pytest.warns(UserWarning, match=r"same order of data but not the same bits: paths was half"):
        train_tiny("samples=5120", "model.tile_latents=16", "model.half_product=false")


def test_an_architecture_that_nothing_can_load_is_refused_before_it_is_trained(train_tiny, monkeypatch) -> None:
    monkeypatch.delitem(OWN_TENSORS, "topk")
    with pytest.raises(ConfigError, match="'topk' could be trained but not loaded again"):
        train_tiny()


def test_a_knob_out_of_range_names_the_field_that_set_it(train_tiny) -> None:
    with pytest.raises(ConfigError, match=r"^model\.k = 0\.01: this model's k lies between 0\.0625 and 64"):
        train_tiny("model=batchtopk", "model.k=0.01")


def test_a_longer_budget_says_where_the_learning_rate_jumps(train_tiny, capsys) -> None:
    train_tiny("schedule=linear")
    train_tiny("schedule=linear", "samples=10240")
    assert "the learning rate here goes from 0 to 0.001" in capsys.readouterr().out


@pytest.mark.slow  # the compiler takes some ten seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, while it traces
@pytest.mark.parametrize(
    "model",
    [
        ("model=jumprelu", "model.recipe=tanh"),
        # p moves after each of the four steps
        ("model=relu", "model.penalty=p", "model.p_start_fraction=0.0", "model.rescale=true"),
    ],
    ids=["jumprelu", "relu, p-annealed"],
)
def test_a_compiled_run_has_the_same_names_and_numbers(train_tiny, tmp_path: Path, model: tuple[str, ...]) -> None:
    words = (*model, "model.dense_above=0.0", "samples=1024")
    plain_run = train_tiny(*words, f"run_dir={tmp_path}/plain")
    compiled = train_tiny(*words, "compile=true", f"run_dir={tmp_path}/compiled")
    assert compiled["metrics"]["train/loss"] == pytest.approx(plain_run["metrics"]["train/loss"], rel=1e-4)
    names = [
        set(torch.load(list_checkpoints(tmp_path / name / "checkpoints")[0][1], weights_only=True)["state_dict"])
        for name in ("plain", "compiled")
    ]
    assert names[0] == names[1]
