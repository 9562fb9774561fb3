"""scripts/steer.py: what is wrong is one line, said before a language model is loaded."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import sparsepilot.lm.load
from sparsepilot.analysis.evaluate import LATENTS

from .test_cross_entropy import build
from .test_evaluate import run_of

GOOD = ["latent=3", "value=5", "tokens=2"]


@pytest.fixture
def run(compose_cfg: Any, tiny_folder: Path, tmp_path: Path) -> Path:
    return run_of(compose_cfg, build(tiny_folder, tmp_path / "built"), tiny_folder, tmp_path / "on-text")


def steer(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["steer.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "steer.py"), run_name="__main__")


def test_text_comes_with_the_latent_as_it_is_out_and_held(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steer(monkeypatch, f"run_dir={run}", *GOOD, "prompt=a b c")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[-3:-1]] == ["as it is", "taken out"]
    assert lines[-1].startswith("held at 5 ")


def test_what_is_wrong_is_said_before_a_model_is_loaded(
    run: Path, train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny()  # on synthetic rows
    capsys.readouterr()
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("checkpoints"))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(sparsepilot.lm.load, "_require_transformers", never)

    def refused(message: str, *words: str, folder: Path = run) -> None:
        with pytest.raises(SystemExit) as stopped:
            steer(monkeypatch, f"run_dir={folder}", *words)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert line.startswith("error: ")
        assert message in line

    refused("latent: missing; set latent=..., or about=...")
    for field, wrong, message in [
        ("latent", "64", "the dictionary has 0 to 63"),
        ("latent", "-1", "should be the number of a latent"),
        ("latent", "abc", "should be the number of a latent"),
        ("value", "abc", "should be a finite number"),
        ("value", ".inf", "should be a finite number"),
        ("strength", "x", "should be a finite number"),
        ("strength", "null", "should be a finite number"),
        ("tokens", "0", "should be a whole number of at least 1"),
        ("keep_error", "maybe", "should be true or false"),
        ("lm", "none", "a language model is what is steered"),
        ("lm.dtpe", "float32", "there is no such field; did you mean 'dtype'"),
    ]:
        refused(f"{field} = ", *GOOD, f"{field}={wrong}")
        refused(message, *GOOD, f"{field}={wrong}")
    refused("its rows were not made by one language model", *GOOD, folder=tmp_path / "run")
    refused("evaluation_latents.json is not there yet", "latent=3")
    for text, message in [
        ('{"density":', "is damaged"),
        ("[1]", "holds list, an object with fields is needed"),
        (json.dumps({"density": [0.1], "mean": [0.1], "max": [1]}), "density is not a number for each of the 64"),
    ]:
        (broken / LATENTS).write_text(text)
        refused(message, "latent=3", folder=broken)
    for text, message in [
        ("a: [", "config.yaml: is damaged"),
        ("", "config.yaml: is no configuration of a run"),
        ("- 1", "config.yaml: holds list"),
        ("data: {}\nlm: 3", "config.yaml: lm is 3, an object with fields is needed"),
    ]:
        (broken / "config.yaml").write_text(text)
        refused(message, *GOOD, folder=broken)
