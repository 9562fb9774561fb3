"""scripts/estimate.py: what it takes, what it refuses, what it prints."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsepilot.estimate.calibration import corner_sizes
from sparsepilot.estimate.scaling import page
from sparsepilot.estimate.speed import Corner, from_corners

ROOT = Path(__file__).parents[3]
Run = Callable[..., str]
THERE_IS_NOTHING = ("model=topk", "data=cache", "d_in=2304", "rows=1_000_000", "data.num_streams=64", "logger=none")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("device=h100", ...): what the script prints, errors included."""

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["estimate.py", *words])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / "scripts" / "estimate.py"), run_name="__main__")
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


def test_a_job_of_which_nothing_is_there(run: Run, tmp_path: Path) -> None:
    """64 GPUs, no GPU here; 200M rows, no cache here; and a dictionary that no memory here would hold."""
    found: dict[str, dict[str, Any]] = {}
    for trainer in ("ddp", "ddp trainer.strategy.gradients=bfloat16"):
        out = tmp_path / f"{len(found)}.json"
        text = run(
            *THERE_IS_NOTHING, "model.d_sae=1048576", *f"trainer={trainer}".split(), "devices=64", "nodes=8",
            "device=h100", "batch=65536", "samples=1_000_000_000", f"json={out}",
        )  # fmt: skip
        assert "samples/s" in text
        assert "assumed, not measured" in text
        found[trainer] = json.loads(out.read_text(encoding="utf-8"))
    whole, half = found.values()
    numbers = 2 * 1048576 * 2304 + 1048576 + 2304
    assert whole["parameters"] == numbers
    assert whole["memory_bytes"]["lasting"]["parameters"] == 4 * numbers
    assert whole["memory_bytes"]["lasting"]["optimizer (Adam)"] == 8 * numbers
    assert whole["world"]["rows_per_rank"] == 1024
    sent = whole["sent_bytes_per_rank_and_step"]
    assert sent["gradients"] == pytest.approx(2 * 63 / 64 * 4 * numbers)
    assert half["sent_bytes_per_rank_and_step"]["gradients"] == sent["gradients"] / 2
    assert not whole["fits"]  # 16 bytes a parameter are 77 GB
    rows_bytes = 1_000_000 * (2304 * 2 + 3 * 4)
    assert rows_bytes < whole["disk_bytes"]["cache (to be built)"] < 1.01 * rows_bytes
    assert whole["time"]["hours"] == pytest.approx(15259 * whole["time"]["step_s"] / 3600)


def test_two_dictionaries_of_one_size_need_what_their_optimizers_keep(run: Run, tmp_path: Path) -> None:
    kept = {}
    for optimizer in ("adam", "muon", "sign"):
        out = tmp_path / "out.json"
        run(*THERE_IS_NOTHING, f"optimizer={optimizer}", f"json={out}")
        lasting = json.loads(out.read_text(encoding="utf-8"))["memory_bytes"]["lasting"]
        [name] = [name for name in lasting if name.startswith("optimizer")]
        kept[optimizer] = lasting[name] / lasting["parameters"]
    assert kept["adam"] == 2
    assert kept["sign"] == 1
    assert 1 < kept["muon"] < 1.001  # Adam on biases


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("device=h10",), "device = h10: is not known; did you mean 'h100'"),
        (("device=tpu",), "known: l4, rtx4090"),
        (("devices=64", "trainer=ddp", "nodes=7"), "devices = 64, nodes = 7"),
        (("devices=4",), "several ranks need trainer=ddp"),
        (("devices=48", "trainer=ddp"), "cannot share data.num_streams = 64 equally"),
        (("devices=0", "trainer=ddp"), "devices = 0: should be greater than 0"),
        (("devicse=8",), "devicse"),
        (("trainer=ddp",), "there is no GPU here to count; say how many"),
        (("calibrate=true", "device=h100"), "a calibration is of this machine"),
        (("model.k=100000",), "model.k = 100000: at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], says: str, run: Run) -> None:
    text = run(*THERE_IS_NOTHING, *words)
    assert text.startswith("error: ")
    assert says in text
    assert len(text.strip().splitlines()) == 1


def test_a_width_that_nobody_knows(run: Run) -> None:
    assert "give d_in=..." in run("data=lm", "data.path=nowhere", "data.sites=[model.layers.1]")


def test_the_page_is_what_the_script_writes() -> None:
    assert page(ROOT / "conf") == (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_noise_on_four_corners_does_not_blow_up() -> None:
    """2% on each of four timed steps are at most 7% of the step that is told from them."""

    def truth(rows: int, latents: int) -> float:
        return 0.002 + 4e-6 * rows + 3e-6 * latents + 2e-9 * rows * latents

    for signs in range(16):
        noisy = [
            Corner(b, f, truth(b, f) * (1.02 if signs >> i & 1 else 0.98))
            for i, (b, f) in enumerate(corner_sizes(4096, 16384))
        ]
        assert from_corners(noisy, 4096, 16384) == pytest.approx(truth(4096, 16384), rel=0.07)
