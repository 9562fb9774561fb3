"""What the pictures show is what the rows say, on the axes that they were specified with."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_run import BATCH, D_SAE, write_reference_run

from sparsepilot import schedules
from sparsepilot.reporting import report as reports
from sparsepilot.reporting.as_image import draw_figure
from sparsepilot.reporting.as_image import power_text as image_text
from sparsepilot.reporting.as_plotly import figure
from sparsepilot.reporting.figure import Axis, Band, Line, Panel, Picture, axis
from sparsepilot.reporting.labels import differences, labels
from sparsepilot.reporting.overlay import overlay
from sparsepilot.reporting.page import write_page
from sparsepilot.reporting.pictures import learning_rate, registered
from sparsepilot.reporting.pictures.controller_health import at_limit
from sparsepilot.reporting.runs import Run, read_runs
from sparsepilot.reporting.style import band_alpha, key_names, look
from sparsepilot.reporting.tables import configuration_differences, results
from sparsepilot.reporting.thin import thin
from sparsepilot.reporting.ticks import Tick, linear_places, ticks
from sparsepilot.run_folder import RunFolder

FIVE = ["l0", "loss", "control", "dead_latents", "learning_rate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference_run(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(folder: Path) -> dict[str, Picture]:
    drawn = reports.draw_pictures(read_runs(RunFolder(folder)), ["a run"])
    assert [picture.name for picture in drawn][:5] == FIVE
    return {picture.name: picture for picture in drawn}


def texts(axis: Axis) -> list[str]:
    return [tick.text for tick in ticks(axis)]


def points(rows: Sequence[dict[str, Any]], x: str, y: str, per: float = 1.0) -> list[tuple[float, float]]:
    return [(row[x] / per, row[y]) for row in rows if y in row]


def drawing_of(name: str, run: Run) -> Picture:
    return next(draw for draw in registered() if draw.__module__.endswith(f".{name}"))(run)


def drawn(picture: Picture, panel: int, name: str) -> list[tuple[float, float]]:
    line = next(line for line in picture.panels[panel].lines if line.name == name)
    return list(zip(line.x, line.y, strict=True))


def test_l0_is_log10_over_millions_of_samples_with_the_set_point_beside_it(pictures, rows) -> None:
    picture = pictures["l0"]
    (panel,) = picture.panels
    assert (panel.x.label, panel.x.log, panel.x.low) == ("samples (M)", False, 0.0)
    assert panel.x.high == pytest.approx(200, rel=1e-3)
    assert texts(panel.x) == ["0", "25", "50", "75", "100", "125", "150", "175", "200"]
    assert panel.y.log
    assert texts(panel.y) == ["10", "100", "1,000", "10,000"]
    assert drawn(picture, 0, "training batch") == points(rows, "samples", "train/l0", 1e6)
    assert drawn(picture, 0, "set point") == points(rows, "samples", "controller/target", 1e6)
    assert drawn(picture, 0, "validation") == points(rows, "samples", "val/l0", 1e6)
    roles = {line.name: (line.role, line.kind) for line in panel.lines}
    assert roles["set point"][0] == "set_point"
    assert roles["validation"] == ("validation", "points")


def test_loss_is_raw_over_steps_below_and_tokens_above(pictures, rows) -> None:
    (panel,) = pictures["loss"].panels
    assert (panel.x.label, panel.x.log, panel.x.low) == ("optimizer step", True, 1.0)
    assert texts(panel.x) == ["10^0", "10^1", "10^2", "10^3", "10^4"]
    assert panel.top is not None
    assert (panel.top.label, panel.top.log) == ("tokens", True)
    assert texts(panel.top) == ["10^5", "10^6", "10^7", "10^8"]
    assert panel.top_per_x == BATCH
    assert (panel.top.low, panel.top.high) == (panel.x.low * BATCH, panel.x.high * BATCH)
    assert (panel.y.log, panel.y.low) == (False, 0.0)
    shown = drawn(pictures["loss"], 0, "training loss")
    assert shown == points(rows, "step", "train/loss")
    assert [x for x, _ in shown][:100] == list(range(1, 101))


def test_control_has_three_panels_over_steps(pictures, rows) -> None:
    sparsity, strength, quality = pictures["control"].panels
    steps = -(-200_000_000 // BATCH)
    for panel in (sparsity, strength, quality):
        assert (panel.x.label, panel.x.log, panel.x.low, panel.x.high) == ("training step", False, 0.0, steps)
    assert [panel.y.log for panel in (sparsity, strength, quality)] == [True, False, False]
    assert drawn(pictures["control"], 0, "training batch") == [
        (x, y / D_SAE) for x, y in points(rows, "step", "train/l0")
    ]
    assert drawn(pictures["control"], 0, "validation") == [(x, y / D_SAE) for x, y in points(rows, "step", "val/l0")]
    assert drawn(pictures["control"], 1, "strength") == points(rows, "step", "controller/strength")
    assert strength.y.label == "regularization strength"
    assert drawn(pictures["control"], 2, "measured") == points(rows, "step", "val/ce")
    assert {y for _, y in drawn(pictures["control"], 2, "target")} == {2.3}
    assert next(line for line in quality.lines if line.name == "target").role == "set_point"  # dashed


def test_the_dead_window_is_shown_beside_the_count(pictures, rows) -> None:
    (panel,) = pictures["dead_latents"].panels
    assert drawn(pictures["dead_latents"], 0, "dead") == points(rows, "samples", "train/dead_latents", 1e6)
    assert [(band.low, band.high, band.label) for band in panel.bands] == [(0.0, 10.0, "dead window 10M samples")]


def test_the_reference_schedule_has_its_ticks_its_jump_and_its_end() -> None:
    picture = learning_rate.draw_schedule(schedules.reference, 1_825_000_000, "reference")
    (panel,) = picture.panels
    (line,) = panel.lines
    assert (panel.x.label, panel.x.low, panel.x.high, panel.x.log) == ("samples", 0.0, 1.825e9, False)
    assert texts(panel.x) == ["500M", "1G", "1.5G"]
    assert (panel.y.label, panel.y.log, panel.y.low) == ("learning rate", False, 0.0)
    at = dict(zip(line.x, line.y, strict=True))
    assert (at[0], at[49_999_999], at[50_000_000], at[1_825_000_000]) == (1e-4, 8e-4, 6e-4, 2.7e-4)
    assert line.end_dot


def test_both_drawings_show_the_same_numbers(pictures) -> None:
    for picture in pictures.values():
        drawing, page = draw_figure(picture), figure(picture)
        traces = [trace for trace in page["data"] if not trace["meta"].get("helper")]
        lines = [line for panel in picture.panels for line in panel.lines]
        assert [(t["x"], t["y"]) for t in traces] == [(list(line.x), list(line.y)) for line in lines]
        for i, (ax, panel) in enumerate(zip(drawing.axes, picture.panels, strict=True)):
            number = "" if i == 0 else str(i + 1)
            for ours, limits, name, mpl_axis in (
                (panel.x, ax.get_xlim(), "xaxis", ax.xaxis), (panel.y, ax.get_ylim(), "yaxis", ax.yaxis),
            ):  # fmt: skip
                theirs = page["layout"][name + number]
                assert limits == pytest.approx((ours.low, ours.high))
                reach = [10**end for end in theirs["range"]] if ours.log else theirs["range"]
                assert reach == pytest.approx(limits)
                assert (theirs["type"] == "log") == (mpl_axis.get_scale() == "log") == ours.log
                assert theirs["title"]["text"] == mpl_axis.get_label_text() == ours.label
                assert list(mpl_axis.get_majorticklocs()) == theirs["tickvals"] == [t.value for t in ticks(ours)]
                assert [t.get_text() for t in mpl_axis.get_ticklabels()] == [image_text(t.text) for t in ticks(ours)]
            in_file = [line for line in ax.get_lines() if len(line.get_xdata()) > 1]
            on_page = [line for line in panel.lines if line.kind != "steps" and len(line.x) > 1]
            shown = [(list(line.get_xdata()), list(line.get_ydata())) for line in in_file]
            for line in on_page:
                assert (list(line.x), list(line.y)) in shown


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """A run without a row, one without a closed loop, one whose rows are broken: a report each."""
    config = {"model": {"d_sae": 64}, "samples": 5120, "batch": 256}
    rows = [
        {"step": step, "samples": 256 * step, "tokens": 256 * step, "train/loss": float("nan") if step == 2 else 3.0,
         "train/l0": 4.0, "train/dead_latents": 0, "train/lr": 1e-3, "controller/strength": 0.0}
        for step in (1, 2, 3)
    ]  # fmt: skip
    for number, some in enumerate(([], rows[:1], rows)):
        run = Run("a run", config, some)
        pictures = reports.draw_pictures([run], ["a run"])
        for picture in pictures:
            draw_figure(picture)
        write_page(pictures, [run], ["a run"], tmp_path / f"{number}.html")
        by_name = {picture.name: picture for picture in pictures}
        said = [panel.missing for panel in by_name["control"].panels]
        assert said[2] == "no val/ce in the rows: cross_entropy=spliced measures it"
        assert (said[0] is None) == bool(some)
        assert "controller=l0_target" in str(by_name["controller_health"].panels[1].missing)
        assert len(by_name["frontier"].panels) == 1  # none for a cross-entropy that nobody measured
        if not some:
            assert by_name["l0"].panels[0].missing == "no train/l0 in the rows: the run has none yet"
    drawn = by_name["loss"].panels[0].lines[0].y
    assert [math.isnan(y) for y in drawn] == [False, True, False]  # a gap, not a line across it


def test_a_frontier_from_one_run_and_from_the_ends_of_several() -> None:
    config = {"model": {"d_sae": 64}, "samples": 5120, "batch": 256}
    pareto = [
        {
            "step": i,
            "samples": 256 * i,
            "frontier/target": l0,
            "frontier/l0": l0,
            "frontier/fvu": 1 / l0,
            "frontier/ce": 3.0,
            "frontier/settled": 1.0,
        }
        for i, l0 in enumerate((32.0, 16.0, 8.0), start=1)
    ]
    pareto.insert(
        2, {**pareto[2], "frontier/l0": 9.0, "frontier/fvu": 0.5}
    )  # the end, before the budget was made longer
    draw = next(draw for draw in registered() if draw.__module__.endswith(".frontier"))
    fvu, ce = draw(Run("", config, pareto)).panels
    assert [(line.x, line.y) for line in fvu.lines] == [([8, 16, 32], [1 / 8, 1 / 16, 1 / 32])]
    assert ce.lines[0].y == [3.0] * 3
    ends = [Run("", config, [{"step": 1, "samples": 256, "val/l0": l0, "val/fvu": 0.1 * l0}]) for l0 in (2, 4)]
    (together,) = overlay([draw(run) for run in ends], ["a", "b"]).panels
    assert [(line.run, line.x, line.y) for line in together.lines] == [(0, [2], [0.2]), (1, [4], [0.4])]
    assert together.x.low < 2 < 4 < together.x.high


def test_a_frontier_tells_what_did_not_settle_and_one_last_validation() -> None:
    rows = [
        {
            "step": i,
            "samples": 256 * i,
            "frontier/target": l0,
            "frontier/l0": l0,
            "frontier/fvu": fvu,
            "frontier/settled": s,
        }
        for i, l0, fvu, s in [(1, 8.0, 0.2, 1.0), (2, 6.0, 0.3, 0.0), (3, 4.0, 0.4, 1.0), (4, 3.0, math.nan, 1.0)]
    ]
    rows += [
        {"step": 4, "samples": 1024, "val/l0": 4.0, "val/fvu": 0.4, "val/ce": 2.5},
        {"step": 5, "samples": 1280, "val/l0": 3.0, "val/fvu": float("nan")},
    ]
    picture = drawing_of("frontier", Run("", {"model": {"d_sae": 64}, "samples": 5120, "batch": 256}, rows))
    fvu, ce = picture.panels
    assert [(line.name, line.kind, list(line.x), list(line.y)) for line in fvu.lines] == [
        ("held", "joined_points", [4, 8], [0.4, 0.2]),
        ("not settled", "points", [6], [0.3]),
        ("last validation", "points", [4], [0.4]),
    ]
    assert [look(line, 1).ring for line in fvu.lines] == [False, True, True]
    assert fvu.notes == ["1 not settled"]
    assert [(line.x, line.y) for line in ce.lines] == [([4.0], [2.5])]  # not the 3.0 of a later row
    draw_figure(picture)


def test_a_frontier_leaves_out_an_l0_of_zero_and_says_so() -> None:
    config, note = {"model": {"d_sae": 64}, "samples": 5120, "batch": 256}, "L0 was 0, not drawn on a log axis"
    held = [
        {"step": i, "samples": 256 * i, "frontier/target": l0 + 1, "frontier/l0": l0, "frontier/fvu": 1 / (1 + l0),
         "frontier/settled": float(l0 != 0.5)}
        for i, l0 in enumerate((3.0, 1.0, 0.5, 0.0), start=1)
    ]  # fmt: skip
    end = {"step": 4, "samples": 1024, "val/l0": 0.0, "val/fvu": 1.0, "val/ce": 9.0}
    before = {"step": 3, "samples": 768, "val/l0": 5.0, "val/fvu": 0.1, "val/ce": 3.0}
    pareto = drawing_of("frontier", Run("", config, [*held, end]))
    assert [(line.name, line.x) for line in pareto.panels[0].lines] == [("held", [1, 3]), ("not settled", [0.5])]
    assert pareto.panels[0].notes == ["1 not settled", note]
    assert 0.4 < pareto.panels[0].x.low < 0.5
    collapsed = drawing_of("frontier", Run("", config, [before, end]))
    for picture in (pareto, overlay([collapsed], [""])):
        draw_figure(picture)
        assert not any(x <= 0 for panel in picture.panels for line in panel.lines for x in line.x)
        assert picture.panels[1].missing == note  # not a cross-entropy that nobody measured
    assert (collapsed.panels[0].missing, list(collapsed.panels[0].notes)) == (note, [])
    both = overlay([collapsed, drawing_of("frontier", Run("", config, [before]))], ["a", "b"]).panels[0]
    assert [(line.run, line.x) for line in both.lines] == [(1, [5.0])]
    assert both.notes == ["1 of 2 runs have this"]


def test_an_l0_of_zero_is_a_gap_and_said() -> None:
    def picture(name: str, *l0: float) -> Picture:
        rows = [{"step": i, "samples": i, "train/l0": v, "controller/strength": v} for i, v in enumerate(l0, 1)]
        return drawing_of(name, Run("", {"model": {"d_sae": 2}, "samples": 9, "batch": 1}, rows))

    for name, what in (("l0", "L0"), ("control", "L0"), ("controller_health", "strength")):
        broken = picture(name, 4, 0, 0, 2, 1)
        (line,) = broken.panels[0].lines
        per = 2 if name == "control" else 1
        assert [v * per for v in line.y if not math.isnan(v)] == [4, 2, 1]
        assert [math.isnan(v) for v in line.y] == [False, True, False, False]
        assert broken.panels[0].notes == [f"gap: {what} was 0, not drawn on a log axis"]
        assert figure(broken)["data"][0]["y"][1] is None
        assert picture(name, 0, 0).panels[0].missing == f"{what} was 0 throughout"
        draw_figure(broken)
    assert picture("l0", math.nan).panels[0].missing == "no finite train/l0 in the rows"
    assert picture("control", math.nan).panels[0].missing == "no finite train/l0 in the rows"


@pytest.mark.parametrize("quality", ["fvu", "ce_gap"])
def test_the_quality_that_is_held_is_drawn_with_its_target(quality: str) -> None:
    """By the configuration: the values would say the other."""
    held = {"controller/quality": 2.3 if quality == "fvu" else 0.2, "controller/quality_target": 0.1}
    rows = [{"step": 1, "samples": 256, "val/ce": 2.3, "train/fvu": 0.2, **held}]
    config = {"model": {"d_sae": 64}, "controller": {"quality": quality}, "samples": 5120, "batch": 256}
    panels = overlay([drawing_of("control", Run("", config, rows))], [""]).panels[2:]
    shown = [(panel.y.label, [(line.name, line.y) for line in panel.lines]) for panel in panels]
    ce, target = ("measured", [2.3]), ("target", [0.1])
    if quality == "fvu":
        assert shown == [("validation cross-entropy (nats)", [ce]), ("FVU held", [ce, target])]
    else:
        assert shown == [("validation cross-entropy (nats)", [ce, target])]


def test_what_changes_what_is_computed_is_a_difference() -> None:
    same = {"callbacks": {"keep_last": 2, "disturb": None}, "data": {"path": "a", "build": {"seed": 0}}}
    lm = {"lm": {"id": "one", "device": "cpu"}, "text": {"source": "files"}, "run_dir": "a"}
    other = {
        "callbacks": {"keep_last": 3, "disturb": {"at": 0.25}},
        "data": {"path": "b", "build": {"seed": 1}},
        "lm": {"id": "two", "device": "cuda"},
        "text": {"source": "python_docs"},
        "run_dir": "b",
    }

    def fields(*fingerprints: str | None) -> list[str]:
        configs = (same | lm, other)
        runs = [Run("", config, [], cache_fingerprint=f) for config, f in zip(configs, fingerprints, strict=True)]
        return [difference.field for difference in differences(runs)]

    told = ["data.build.seed", "lm.id", "text.source", "callbacks.disturb.at"]
    assert sorted(fields("0" * 64, "0" * 64)) == sorted(told)
    assert sorted(fields("0" * 64, "1" * 64)) == sorted([*told, "cache"])
    assert sorted(fields(None, "1" * 64)) == sorted([*told, "data.path"])


def test_no_two_of_many_runs_look_alike() -> None:
    lines = [Line("", "measured", [1], [1], kind=kind, run=run) for run in range(20) for kind in ("line", "points")]
    picture = Picture("p", "p", [Panel("", Axis("x", 0, 2), Axis("y", 0, 2), lines)], [str(i) for i in range(20)])
    traces = figure(picture)["data"]
    by_trace = [(trace["meta"]["colour"]["light"], trace["line"]["dash"]) for trace in traces if "marker" not in trace]
    by_marker = [(t["meta"]["colour"]["light"], t["marker"]["symbol"]) for t in traces if "marker" in t]
    (ax,) = draw_figure(picture).axes
    by_stroke = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in ax.get_lines()[::2]]
    by_shape = [(line.get_color(), line.get_marker()) for line in ax.get_lines()[1::2]]
    assert [len(set(found)) for found in (by_trace, by_marker, by_stroke, by_shape)] == [20] * 4


def test_a_thin_band_is_seen_and_a_long_name_stays_beside_the_title() -> None:
    band = Band(1.0, 1.0001, "at a limit")
    picture = Picture("p", "Loss over training", [Panel("", Axis("x", 0, 100), Axis("y", 0, 2), bands=[band])])
    drawing = draw_figure(picture, "/scratch/somebody/" + "sweeps/batch=4096/" * 9 + "last")
    assert drawing.axes[0].patches[0].get_linewidth() == 0.8
    assert figure(picture)["layout"]["shapes"][0]["line"]["width"] == 1
    title, subtitle = (text.get_window_extent() for text in drawing.texts)
    assert title.x1 < subtitle.x0
    assert drawing.texts[1].get_text().startswith("…")
    assert drawing.texts[1].get_text().endswith("/last")


def test_several_runs_are_named_by_what_differs(folder: Path, tmp_path: Path) -> None:
    other = write_reference_run(tmp_path / "other", samples=100_000_000, controller={"target_l0": 8.0}, batch=8192)
    runs = [run for path in (folder, other) for run in read_runs(RunFolder(path))]
    assert labels(runs) == ["target_l0=4, samples=200M, batch=16,384", "target_l0=8, samples=100M, batch=8,192"]
    table = configuration_differences(runs, labels(runs))
    assert [list(row) for row in table.rows] == [
        ["controller.target_l0", "4", "8"], ["samples", "200,000,000", "100,000,000"], ["batch", "16,384", "8,192"],
    ]  # fmt: skip
    table = results(runs, labels(runs))
    assert table.rows[0][0] == labels(runs)[0]
    assert table.rows[0][table.head.index("cross-entropy")].endswith(" ± 0.0100")
    by_name = {picture.name: picture for picture in reports.draw_pictures(runs, labels(runs))}
    (l0,) = by_name["l0"].panels
    assert {line.run for line in l0.lines} == {0, 1}
    assert l0.x.high == pytest.approx(200, rel=1e-3)
    (loss,) = by_name["loss"].panels
    assert loss.top is None  # a step is another number of tokens in each
    assert loss.notes == ["batch sizes differ, so there is no common axis of tokens"]
    colours = {trace["meta"]["run"]: trace["meta"]["colour"]["light"] for trace in figure(by_name["l0"])["data"]
               if not trace["meta"].get("helper")}  # fmt: skip
    assert len(set(colours.values())) == 2


def test_quantities_are_not_mixed_in_one_panel() -> None:
    config = {"samples": 5120, "batch": 256}
    row = {"step": 1, "samples": 256, "controller/strength": 8.0}
    runs = [Run("", config | {"model": model}, [row]) for model in ({"d_sae": 64, "k": 8}, {"d_sae": 64})]
    draw = next(draw for draw in registered() if draw.__module__.endswith(".control"))
    strength = overlay([draw(run) for run in runs], ["topk", "relu"]).panels[1]
    assert [line.run for line in strength.lines] == [0]
    assert strength.notes == ["1 of 2 runs have this", "not drawn: regularization strength of the others"]


def test_notes_and_titles_of_a_file_do_not_overlap() -> None:
    config = {"samples": 5120, "batch": 256}
    row = {"step": 1, "samples": 256, "controller/strength": 8.0, "train/l0": 8.0}
    runs = [Run("", config | {"model": model}, [row]) for model in ({"d_sae": 64, "k": 8}, {"d_sae": 64})]
    figure = draw_figure(overlay([drawing_of("control", run) for run in runs], ["topk", "relu"]))
    figure.canvas.draw()
    for ax in figure.axes:
        title = ax._left_title.get_window_extent()
        assert not any(title.overlaps(text.get_window_extent()) for text in ax.texts)


def test_cross_entropy_is_drawn_beside_a_run_that_holds_another_quality() -> None:
    config = {"model": {"d_sae": 64}, "samples": 5120, "batch": 256}
    one = {"step": 1, "samples": 256, "controller/quality": 0.2, "controller/quality_target": 0.1}
    two = {"step": 1, "samples": 256, "val/ce": 2.3, "controller/quality": 2.3, "controller/quality_target": 2.4}
    runs = [
        Run("", config | {"controller": {"quality": quality}}, [row])
        for quality, row in (("fvu", one), ("ce_increase", two))
    ]
    for first, second in ((0, 1), (1, 0)):
        panels = overlay([drawing_of("control", runs[i]) for i in (first, second)], ["a", "b"]).panels[2:]
        assert [(panel.y.label, [line.y for line in panel.lines]) for panel in panels] == [
            ("validation cross-entropy (nats)", [[2.3], [2.4]]),
            ("FVU held", [[0.2], [0.1]]),
        ]
        assert all(panel.notes == ["1 of 2 runs have this"] for panel in panels)


def test_keys_of_several_runs_are_named_as_their_lines_are() -> None:
    config = {"model": {"d_sae": 64}, "samples": 5120, "batch": 256}
    row = {"step": 1, "samples": 256, "train/dead_latents": 3, "val/silent_latents": 5, "controller/target": 8.0}
    rows = [row | {"train/l0": 9.0, "val/l0": 8.0, "controller/quality": 0.2, "controller/quality_target": 0.1}]
    for name, keys in (
        ("dead_latents", ["silent over a whole pass"]),
        ("control", ["set point, target", "validation"]),
    ):
        both = overlay([drawing_of(name, Run("", config, rows))] * 2, ["a", "b"])
        assert [key for key, _, _ in key_names(both)] == keys
        assert [text.get_text() for text in draw_figure(both).legends[0].get_texts()] == ["a", "b", *keys]


def test_long_names_of_runs_are_not_cut_off() -> None:
    config = {"model": {"d_sae": 64}, "samples": 5120, "batch": 256}
    drawn = drawing_of("l0", Run("", config, [{"step": 1, "samples": 256, "train/l0": 9.0}]))
    figure = draw_figure(overlay([drawn] * 2, [f"{'some field=a value, ' * 9}the last={n}" for n in "ab"]))
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert legend.get_window_extent().y0 >= figure.axes[0].get_window_extent().y1


def test_a_limit_that_comes_and_goes_is_shaded_by_its_share() -> None:
    """12,000 rows of which every tenth stood at one: bands of their own would hide the panel."""
    rows = [
        {"step": n, "samples": 256 * n, "controller/strength": 1.0, "controller/at_limit": float(n % 10 == 0)}
        for n in range(1, 12_001)
    ]
    drawn = drawing_of("controller_health", Run("", {"model": {}, "samples": 256 * 12_000, "batch": 256}, rows))
    (band,) = drawn.panels[0].bands
    assert (band.low, band.high, band.share) == (0.0, pytest.approx(3.072), 0.25)
    assert band_alpha(band) < 0.15


@settings(deadline=None)
@given(st.integers(1, 8192), st.integers(200, 3000), st.integers(2, 7))
def test_no_stretch_without_a_limit_is_shaded(batch: int, num_steps: int, every: int) -> None:
    budget = batch * num_steps
    samples = [float(batch * n) for n in range(1, num_steps + 1)]
    for band in at_limit(samples, [float(n % every == 0) for n in range(num_steps)], budget):
        assert band.share is None or band.share > 0
        assert 0 <= band.low < band.high <= budget / 1e6 * (1 + 1e-9)


def test_a_run_that_goes_on_under_a_longer_budget_is_not_told_by_its_earlier_end() -> None:
    config = {"model": {"d_sae": 64}, "samples": 10_240, "batch": 256}
    summary = {"samples": 5120, "training_s": 10.0, "samples_per_s": 512.0}
    end = {"step": 20, "samples": 5120, "val/kl": 0.5, "train/dead_latents": 3}
    timing = [{"samples": 5120, "elapsed_s": 10.0}, {"samples": 7680, "elapsed_s": 20.0}]
    told = {}
    for name, rows in (("ended", [end]), ("goes on", [end, {"step": 30, "samples": 7680, "train/dead_latents": 1}])):
        table = results([Run("", config, rows, summary, timing)], [""])
        told[name] = dict(zip(table.head, table.rows[0], strict=True))
    assert (told["ended"]["KL"], told["ended"]["samples/s"], told["ended"]["training"]) == ("0.5000", "512", "10 s")
    assert "KL" not in told["goes on"]
    assert (told["goes on"]["samples/s"], told["goes on"]["training"]) == ("256", "30 s")
    assert told["goes on"]["dead"] == "1 in 1.024k"  # a count is nothing without its window


def test_each_trainee_of_a_run_is_a_run_of_its_own(tmp_path: Path) -> None:
    path = write_reference_run(tmp_path / "run", samples=10 * BATCH, trainees={"one": {}, "two": {}})
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    clock = ("step", "samples", "tokens", "train/lr")
    doubled = [
        {key: v for key, v in row.items() if key in clock}
        | {f"{name}/{key}": v * n if isinstance(v, float) else v for n, name in ((1, "one"), (2, "two"))
           for key, v in row.items() if key not in clock}
        for row in rows
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in doubled))
    one, two = read_runs(RunFolder(path))
    assert [run.name.rpartition("/")[2] for run in (one, two)] == ["one", "two"]
    assert two.series("step", "train/l0")[1] == [2 * v for v in one.series("step", "train/l0")[1]]
    assert one.rows == rows
    assert len(set(labels([one, two]))) == 2


def script(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "report.py"), run_name="__main__")


def test_the_script_draws_a_schedule_and_a_comparison(tmp_path: Path, monkeypatch, capsys) -> None:
    script(monkeypatch, "schedule=reference", f"out={tmp_path}/schedule")
    assert {path.name for path in (tmp_path / "schedule").iterdir()} == {
        "learning_rate.png", "learning_rate.svg", "report.html",
    }  # fmt: skip
    page = (tmp_path / "schedule" / "report.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert data["pictures"][0]["layout"]["xaxis"]["ticktext"] == ["500M", "1G", "1.5G"]
    script(monkeypatch, "schedule=reference", "experiment=dynamics_200m", f"out={tmp_path}/dynamics")
    assert '"ticktext": ["50M", "100M", "150M", "200M"]' in (tmp_path / "dynamics" / "report.html").read_text()
    for name in "ab":
        write_reference_run(tmp_path / "runs" / name, samples=5 * BATCH, seed=ord(name))
    script(monkeypatch, f"run_dir={tmp_path}/runs/*", f"out={tmp_path}/both")
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/both/report.html"
    for wrong, line in (
        (["run_dir=nowhere"], "run_dir = nowhere: there is no run here (no config.yaml)"),
        (["run_dir=nowhere/*"], "run_dir = nowhere/*: no run folder (with a config.yaml) matches"),
        (["schedule=referense"], "schedule=referense: there is no conf/schedule/referense.yaml; did you mean"),
        (["runs=a"], "runs = a: there is no such field; "),
    ):
        with pytest.raises(SystemExit):
            script(monkeypatch, *wrong)
        assert capsys.readouterr().err.startswith("error: " + line)


def test_a_report_that_fails_is_one_line_and_no_harm(train_tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(reports, "write_report", fail)
    train_tiny("report=true")
    said = capsys.readouterr().out
    assert (
        f"warning: no report: RuntimeError: no fonts; `python scripts/report.py run_dir={tmp_path}/run` tries" in said
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 5120


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100), st.integers(4, 12), st.booleans())
def test_thinning_keeps_ends_and_extremes(y: list[float], most: int, log_x: bool) -> None:
    x = [float(i + 1) for i in range(len(y))]
    thin_x, thin_y = thin(x, y, most, log_x)
    assert len(thin_x) <= max(most, 4)
    assert set(zip(thin_x, thin_y, strict=True)) <= set(zip(x, y, strict=True))
    assert thin_x == sorted(thin_x)
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert (min(thin_y), max(thin_y)) == (min(y), max(y))
    if len(y) <= most:
        assert thin_y == y


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(3, 10))
def test_linear_ticks_are_few_even_and_inside(low: float, length: float, most: int) -> None:
    high = low + length
    if high - low < 1e-5 * max(abs(low), abs(high)):
        return  # closer than six digits can tell apart
    places = linear_places(low, high, most)
    assert 1 <= len(places) <= most + 2
    assert all(low - 1e-6 * length <= place <= high + 1e-6 * length for place in places)
    steps = [b - a for a, b in pairwise(places)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.booleans())
def test_an_axis_holds_its_values_and_has_a_tick(values: list[float], log: bool) -> None:
    made = axis("", values, log=log)
    assert made.low <= min(values) <= max(values) <= made.high
    assert made.low < made.high
    found: list[Tick] = ticks(made)
    assert found
    assert len({tick.text for tick in found}) == len(found) or max(values) - min(values) < 1e-4 * max(values)
    assert ticks(replace(made, text="samples")) if not log else True
