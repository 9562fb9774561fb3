"""Several dictionaries in one run: each is the run alone, bit for bit, whatever the others do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from killing.compare import value_differences
from omegaconf import OmegaConf

import sparsepilot
from sparsepilot.callbacks.checkpoint_io import list_checkpoints
from sparsepilot.callbacks.run_log import RunLog
from sparsepilot.errors import CheckpointError, ConfigError, NonFiniteError, SparsepilotError
from sparsepilot.reporting.labels import labels
from sparsepilot.reporting.runs import read_runs
from sparsepilot.rows import read_rows, rows_of_trainee
from sparsepilot.run_folder import RunFolder

LONG = ("samples=5120", "callbacks.validate_every_samples=1280")
OWN: dict[str, tuple[str, ...]] = {
    # dead latents that AuxK revives
    "top": ("model.sites=[a]", "model.d_sae=96", "model.k=2"),
    # a loop that hears of every validation
    "jump": (
        *("model=jumprelu", "model.sites=[b,c]", "model.d_sae=40", "optimizer.lr=4e-3"),
        *("controller=l0_target", "controller.target_l0=6"),
    ),
    # asks for validations of its own
    "steps": (
        *(
            "model=batchtopk",
            "model.sites={read:[a],write:[c]}",
            "model.skip=true",
            "model/revival=none",
            "model.d_sae=56",
        ),
        *("controller=pareto", "controller.targets=[12,7,4]", "controller.lag_steps=2", "controller.hold=0.5"),
    ),
    # draws in training, and clips often
    "drawn": (
        *("model=topk", "model.sites=[b]", "model.d_sae=80", "model.k=1", "model/prefixes=random"),
        *("model/revival=resample", "model.revival.every_samples=1024"),
    ),
}
"""Each trainee's overrides as its run alone has them."""


def of_trainee(name: str, overrides: tuple[str, ...]) -> list[str]:
    """The same overrides for a trainee: a group's option in its own package, fields below its name."""
    chosen = {o.partition("=")[0] for o in overrides}
    given = []
    for override in overrides:
        field, _, value = override.partition("=")
        if "." in field:
            given.append(f"++trainees.{name}.{override}")
        else:  # a part of an option that is chosen, too, is there already
            new = "" if field.partition("/")[0] in chosen - {field} else "+"
            given.append(f"{new}{field}@trainees.{name}.{field.replace('/', '.')}={value}")
    return given


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder / "metrics.jsonl"))


def state_of(folder: Path, name: str) -> dict[str, Any]:
    """Everything in the last checkpoint that is a trainee's."""
    checkpoint = torch.load(list_checkpoints(folder / "checkpoints")[0][1], weights_only=True)
    begin = f"trainees.{name}."
    return {key.removeprefix(begin): v for key, v in checkpoint["state_dict"].items() if key.startswith(begin)}


def test_each_is_its_run_alone_bit_for_bit(train_sites, tmp_path: Path) -> None:
    several = tmp_path / "several"
    train_sites(*LONG, f"run_dir={several}", *(o for name, own in OWN.items() for o in of_trainee(name, own)))
    for name, own in OWN.items():
        alone = tmp_path / name
        train_sites(*LONG, f"run_dir={alone}", *own)
        assert list(rows_of_trainee(rows_of(several), name, OWN)) == rows_of(alone), name
        assert list(value_differences(name, state_of(several, name), state_of(alone, "sae"))) == []
        for file in ("sae.safetensors", "sae.json"):
            assert (several / name / file).read_bytes() == (alone / file).read_bytes(), (name, file)
        configs = [OmegaConf.load(folder / "config.yaml") for folder in (several / name, alone)]
        for config in configs:
            config.run_dir = ""
        assert configs[0] == configs[1]
    validated = {name: [r["step"] for r in rows_of(several) if f"{name}/val/l0" in r] for name in OWN}
    assert set(validated["steps"]) > set(validated["jump"])  # what one asks for is measured for that one alone
    assert max(row.get("drawn/train/dead_latents", 0) for row in rows_of(several)) > 0


TWO = ("++trainees.small.model.d_sae=32", "++trainees.wide.model.d_sae=64", "model.k=4")


def test_a_finished_run_gives_each_to_whoever_asks(train_sites, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sparsepilot.callbacks.progress.PLAIN_EVERY_S", 0.0)
    run = tmp_path / "run"
    summary = train_sites(*TWO, "report=true")
    said = capsys.readouterr().out
    for word in ("small", "wide", " of 32", " of 64"):
        assert word in said
    assert re.search(r"training 0.00 / 0.00M samples .*  small L0 4 FVU 0?\.\d+  wide L0 4 FVU 0?\.\d+\n", said)
    assert f"sparsepilot.load('{run / 'small'}')" in said
    assert summary["metrics"]["small/val/fvu"] != summary["metrics"]["wide/val/fvu"]
    own = json.loads((run / "wide" / "summary.json").read_text())
    assert own["metrics"]["val/fvu"] == summary["metrics"]["wide/val/fvu"]
    assert not any("/val" in key or "small" in key for key in own["metrics"])
    assert {name: sparsepilot.load(run / name).cfg["d_sae"] for name in ("small", "wide")} == {"small": 32, "wide": 64}
    with pytest.raises(CheckpointError, match=rf"holds several dictionaries; load one of {run}/small, {run}/wide"):
        sparsepilot.load(run)

    runs = read_runs(RunFolder(run))
    assert labels(runs) == ["small", "wide"]
    assert [run.d_sae for run in runs] == [32, 64]
    assert [run.last("val/fvu") for run in runs] == [summary["metrics"][f"{n}/val/fvu"] for n in ("small", "wide")]
    assert read_runs(RunFolder(run / "wide")) == runs[1:]
    page = (run / "report" / "report.html").read_text()
    assert f"{run}: 2 dictionaries" in page
    assert {"frontier.png", "l0.svg"} <= {path.name for path in (run / "report").iterdir()}

    # their folders are nobody's to train in; the same line goes on, with what is free to change, and another does not
    with pytest.raises(ConfigError, match=r"run_dir = .*/wide: is one of several trainees of another run"):
        train_sites(*TWO, f"run_dir={run}/wide")
    with pytest.warns(UserWarning, match="not the same bits: paths was"):
        train_sites(*TWO, "samples=2048", "++trainees.small.model.tile_latents=16")
    assert "changed: trainees.small.model.tile_latents: None -> 16" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"another configuration \(trainees.small.model.d_sae: 32 -> 16\)"):
        train_sites(*TWO, "samples=2048", "++trainees.small.model.d_sae=16")
    assert {row["step"] for row in rows_of(run) if "wide/train/loss" in row} == set(range(1, 9))


def test_their_order_on_the_command_line_may_change_on_resume(train_sites, tmp_path: Path) -> None:
    """An optimizer's state is restored by place: of two dictionaries of one shape each keeps its own."""
    own = {"fast": "fast: {optimizer: {lr: 1e-2}, seed: 1}", "slow": "slow: {optimizer: {lr: 1e-4}, seed: 2}"}
    begun, turned = (f"trainees={{{own[a]}, {own[b]}}}" for a, b in (("fast", "slow"), ("slow", "fast")))
    for folder, goes_on in (("same", begun), ("other", turned)):
        train_sites(begun, f"run_dir={tmp_path}/{folder}")
        train_sites(goes_on, f"run_dir={tmp_path}/{folder}", "samples=2048")
    same, other = tmp_path / "same", tmp_path / "other"
    assert (same / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    saved = [torch.load(list_checkpoints(folder / "checkpoints")[0][1], weights_only=True) for folder in (same, other)]
    for part in ("state_dict", "optimizer_states"):
        assert list(value_differences(part, saved[0][part], saved[1][part])) == []
    assert list(OmegaConf.load(other / "config.yaml").trainees) == ["fast", "slow"]


def test_a_trainee_s_folder_is_taken_for_a_run(train_sites, tmp_path: Path) -> None:
    from sparsepilot.analysis.evaluate import evaluate, open_subject
    from sparsepilot.reporting.publishing import publish

    summary = train_sites(*TWO, "model.sites=[b]")
    subject = open_subject(str(tmp_path / "run" / "small"), lm="none")
    figures, _ = evaluate(subject, rows=None)
    assert figures["rows"]["fvu"] == pytest.approx(summary["metrics"]["small/val/fvu"], rel=1e-4)
    card = publish(str(tmp_path / "run" / "small"), tmp_path / "out", []).read_text()
    assert f"{summary['metrics']['small/val/fvu']:.4g}" in card


def test_the_best_checkpoint_is_that_of_the_mean_where_all_were_validated(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    figures = [{"a": (0.5, 1.0), "b": (0.1, 2.0)}, {"b": (0.01, 0.1)}, {"a": (0.2, 1.0), "b": (0.6, 2.0)}]
    with open(folder.metrics, "w") as file:
        for number, trainees in enumerate(figures):
            row = {
                f"{name}/val/{key}": v
                for name, values in trainees.items()
                for key, v in zip(("fvu", "loss"), values, strict=True)
            }
            file.write(json.dumps({"samples": 256 * number, **row}) + "\n")
    kept = RunLog(folder, 1024, trainees=["a", "b"]).val_rows
    assert [(row["samples"], row["val/fvu"], row["val/loss"]) for row in kept] == [(0, 0.3, 1.5), (512, 0.4, 1.5)]


def test_seeds_differ_in_draws_and_not_in_rows(train_sites, tmp_path: Path) -> None:
    train_sites("trainees={a: {seed: 0}, b: {seed: 1}, c: {seed: 1}}", "trainer.reproducible=true")
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert metrics["a/train/loss"] != metrics["b/train/loss"] == metrics["c/train/loss"]


def test_what_is_not_finite_is_said_of_the_one(train_sites, monkeypatch) -> None:
    from sparsepilot.autoencoders.topk import TopK

    original = TopK.project_gradients

    def overflow(self: TopK) -> None:
        original(self)
        if self.d_sae == 64:
            assert self.b_enc.grad is not None
            self.b_enc.grad[5] = float("inf")

    monkeypatch.setattr(TopK, "project_gradients", overflow)
    with pytest.raises(NonFiniteError, match=r"^wide: gradient of b_enc is not finite at step 1"):
        train_sites(*TWO)


def test_check_tells_the_size_of_each(train_sites, tmp_path: Path) -> None:
    sizes = train_sites(*TWO, "check=true")
    numbers = {name: 2 * d_sae * 48 + d_sae + 48 for name, d_sae in (("small", 32), ("wide", 64))}
    assert sizes["parameters"] == (f"{sum(numbers.values()):,} (small {numbers['small']:,}, wide {numbers['wide']:,})")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainees=3",), "trainees = 3: a mapping is needed, of names to what is each one's own"),
        (("trainees={a:{model:{k:3}}}",), "trainees = {'a': {'model': {'k': 3}}}: two or more are needed"),
        (("trainees={a:{},half:{}}",), "trainees.half: this name is taken"),
        (("trainees={a:{},train:{}}",), "trainees.train: this name is taken"),
        (("trainees={a:{},3:{}}",), "trainees.3: a name is made of letters, digits, _ and -, a letter first"),
        (("trainees={a:{},b:7}",), "trainees.b = 7: a mapping is needed, of some of model, controller, "),
        (("trainees={a:{},b:{modle:{k:3}}}",), "trainees.b.modle = {'k': 3}: all trainees share it"),
        (("trainees={a:{},b:{batch:512}}",), "trainees.b.batch = 512: all trainees share it; a trainee has its own"),
        (("trainees={a:{},b:{model:topk}}",), "trainees.b.model = topk: a mapping of its fields is needed"),
        (("trainees={a:{},b:{optimizer:{eps:1}}}",), "trainees.b.optimizer = {'eps': 1}: trainees share an optimizer"),
        (("trainees={a:{},b:{seed:x}}",), "trainees.b.seed = x: should be an integer"),
        (("trainees={a:{},b:{seed:-1}}",), "trainees.b.seed = -1: 0 or more is needed"),
        (("trainees={a:{},b:{cross_entropy:{tokens:1}}}",), "trainees.b.cross_entropy = {'tokens': 1}: is measured as"),
        (("trainees={a:{},b:{optimizer:{lr:0}}}",), "trainees.b.optimizer.lr = 0: a positive learning rate is needed"),
        (("trainees={a:{},b:{model:{kk:3}}}",), "trainees.b.model.kk = 3: there is no such field; did you mean 'k'?"),
        (("trainees={a:{},b:{model:{k:99}}}",), "trainees.b.model.k = 99: at most model.d_sae = 48 latents can be"),
        (("trainees={a:{},b:{model:{d_sae:8}}}", "model.k=9"), "trainees.b: model.k = 9: at most model.d_sae = 8"),
        (("trainees={a:{},b:{model:{sites:[d]}}}",), "trainees.b.model.sites: no site 'd' in this cache"),
        (("trainees={a:{},b:{controller:{strength:-1}}}",), "trainees.b.controller.strength = -1: should be greater"),
        (
            ("trainees={a:{},b:{controller:{target_l0:0.5}}}", "controller=l0_target"),
            "trainees.b.controller.target_l0",
        ),
        (("trainees={a:{},b:{model:{init_from:/nowhere}}}",), "trainees.b.model.init_from = /nowhere: /nowhere: there"),
        (("trainees={a:{},b:{}}", "batch=100"), "batch = 100: must be a multiple of data.num_streams"),
        (("trainees={a:{},b:{model:{d_sae:???}}}",), "trainees.b.model.d_sae: missing"),
    ],
)
def test_bad_trainees_are_one_line_before_a_folder_is_made(
    train_sites, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SparsepilotError) as caught:
        train_sites("model.k=4", *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_one_dictionary_may_be_begun_from_another(train_sites, tmp_path: Path, capsys) -> None:
    train_sites("model.k=4", "samples=5120", "optimizer.lr=5e-3")
    origin = tmp_path / "run"
    several = f"trainees={{new: {{}}, tuned: {{model: {{init_from: {origin}}}}}}}"
    train_sites("model.k=5", several, f"run_dir={tmp_path}/several")
    assert "trainees.tuned.model.init_from: it had k = 4, the run has 5" in capsys.readouterr().out
    rows = rows_of(tmp_path / "several")
    assert rows[0]["tuned/train/loss"] < 0.9 * rows[0]["new/train/loss"]
