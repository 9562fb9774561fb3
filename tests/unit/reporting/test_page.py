"""report.html, looked at in a headless browser: what is drawn there is what the rows say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("websocket", reason="needs websocket-client")

from browser import Browser, browser, find_chromium
from reference_run import BATCH, D_SAE, write_reference_run

from sparsepilot.reporting.labels import labels
from sparsepilot.reporting.page import write_page
from sparsepilot.reporting.report import draw_pictures
from sparsepilot.reporting.runs import read_runs
from sparsepilot.run_folder import RunFolder

# slow: starts a browser, whose page takes seconds on a shared core; one start serves all tests
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
DRAWN = "document.documentElement.dataset.drawn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference_run(tmp_path_factory.mktemp("reference") / "run", log_every_steps=1)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    """The reference's page, written once: of a page at the same place the browser keeps the compiled library."""
    return write(folder.parent / "report.html", folder)


@pytest.fixture(scope="module", params=[1, 3])
def report_of_few_rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of so many runs: texts stand where they would with more rows."""
    base = tmp_path_factory.mktemp("few")
    budgets = (200_000_000, *(request.param - 1) * (20_000_000,))
    runs = [write_reference_run(base / str(number), samples) for number, samples in enumerate(budgets)]
    return write(base / "report.html", *runs)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(started: Browser) -> Iterator[Browser]:
    """The browser; whatever a test did there, the console stayed clean and nothing was asked of a network."""
    started.complaints.clear()
    started.requests.clear()
    yield started
    assert started.complaints == []
    assert [url for url in started.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def write(path: Path, *folders: Path) -> Path:
    runs = [run for folder in folders for run in read_runs(RunFolder(folder))]
    return write_page(draw_pictures(runs, labels(runs)), runs, labels(runs), path)


def plot(name: str) -> str:
    return f"document.querySelector('#{name} .plot')"


def drawn_axes(page: Browser, name: str) -> dict[str, dict[str, Any]]:
    """Of each axis: its type and range, and from the drawn elements its title and tick texts."""
    return dict(
        page.value(f"""(() => {{
        const plot = {plot(name)}, found = {{}};
        for (const key of Object.keys(plot._fullLayout).filter((k) => /^[xy]axis\\d*$/.test(k))) {{
            const axis = plot._fullLayout[key], id = axis._id;
            const ticks = [...plot.querySelectorAll("." + id + "tick text")];
            ticks.sort((a, b) => a.getBoundingClientRect().x - b.getBoundingClientRect().x);
            found[key] = {{
                type: axis.type, range: axis.range, title: plot.querySelector(".g-" + id + "title")?.textContent,
                // a raised exponent is an element of its own, between zero-width spaces
                ticks: ticks.map((t) => t.textContent.replace("\\u200b", "^").replaceAll("\\u200b", "")),
                places: ticks.map((t) => t.getBoundingClientRect()).map((box) => box.x + box.width / 2),
            }};
        }}
        return found;
    }})()""")
    )


def series(page: Browser, name: str, which: str) -> tuple[list[float], list[float]]:
    """x and y of a trace, as the library holds them."""
    trace = page.value(f"(() => {{const t = {plot(name)}._fullData.find((t) => t.name === {which!r}); "
                       "return [Array.from(t.x), Array.from(t.y)]})()")  # fmt: skip
    return trace[0], trace[1]


def line_on_screen(page: Browser, name: str, number: int = 0) -> list[tuple[float, float]]:
    """The corners of a drawn line, its pixels turned back into units of its axes."""
    path, x, y = page.value(f"""(() => {{
        const plot = {plot(name)}, l = plot._fullLayout;
        const ends = (axis) => [axis.type, axis.range[0], axis.range[1], axis._length];
        return [plot.querySelectorAll(".scatterlayer .trace .js-line")[{number}].getAttribute("d"),
                ends(l.xaxis), ends(l.yaxis)];
    }})()""")

    def unit(pixel: float, axis: list[Any], upside_down: bool) -> float:
        kind, low, high, length = axis
        part = 1 - pixel / length if upside_down else pixel / length
        value = low + (high - low) * part
        return float(10**value) if kind == "log" else float(value)

    numbers = [(float(a), float(b)) for a, b in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]
    return [(unit(a, x, False), unit(b, y, True)) for a, b in numbers]


def test_the_five_pictures_of_the_reference(page: Browser, report: Path, rows) -> None:
    page.open(report, DRAWN)
    train = [row for row in rows if "train/loss" in row]

    l0 = drawn_axes(page, "l0")
    assert (l0["xaxis"]["type"], l0["yaxis"]["type"]) == ("linear", "log")
    assert l0["xaxis"]["range"] == pytest.approx([0, 200], rel=1e-3)
    assert l0["xaxis"]["ticks"] == ["0", "25", "50", "75", "100", "125", "150", "175", "200"]
    assert sorted(l0["yaxis"]["ticks"], key=len) == ["10", "100", "1,000", "10,000"]
    assert (l0["xaxis"]["title"], l0["yaxis"]["title"]) == ("samples (M)", "L0 (active latents per row)")
    x, y = series(page, "l0", "validation")
    assert y == [row["val/l0"] for row in rows if "val/l0" in row]
    x, y = series(page, "l0", "set point")
    targets = {row["samples"] / 1e6: row["controller/target"] for row in train}
    assert 1000 < len(x) <= 5000
    assert [targets[at] for at in x] == y

    loss = drawn_axes(page, "loss")
    assert (loss["xaxis"]["type"], loss["yaxis"]["type"], loss["xaxis2"]["type"]) == ("log", "linear", "log")
    assert loss["xaxis"]["ticks"] == ["10^0", "10^1", "10^2", "10^3", "10^4"]
    assert loss["xaxis2"]["ticks"] == ["10^5", "10^6", "10^7", "10^8"]
    assert {key: axis["title"] for key, axis in loss.items()} == {
        "xaxis": "optimizer step", "xaxis2": "tokens", "yaxis": "training loss",
    }  # fmt: skip
    per_decade = loss["xaxis"]["places"][1] - loss["xaxis"]["places"][0]
    above = loss["xaxis2"]["places"][0] - loss["xaxis"]["places"][0]
    assert above / per_decade == pytest.approx(math.log10(1e5 / BATCH), abs=0.02)  # 10^5 tokens, at their step
    x, y = series(page, "loss", "training loss")
    all_losses = {row["step"]: row["train/loss"] for row in train}
    assert len(train) > 12_000 > 5000 >= len(x)
    assert [all_losses[at] for at in x] == y
    assert x[:100] == list(range(1, 101))
    assert (min(y), max(y)) == (min(all_losses.values()), max(all_losses.values()))
    corners = line_on_screen(page, "loss")
    assert corners[0] == pytest.approx((1, all_losses[1]), rel=0.01)
    assert corners[-1] == pytest.approx((train[-1]["step"], train[-1]["train/loss"]), rel=0.01)
    assert max(b for _, b in corners) == pytest.approx(max(all_losses.values()), rel=0.01)
    assert "12,208 points are drawn as" in page.value("document.querySelector('#loss p').textContent")

    control = drawn_axes(page, "control")
    assert [control[f"yaxis{n}"]["type"] for n in ("", "2", "3")] == ["log", "linear", "linear"]
    assert {control[f"xaxis{n}"]["title"] for n in ("", "2", "3")} == {"training step"}
    assert control["yaxis"]["title"] == "sparsity (active / all)"
    assert control["yaxis2"]["title"] == "regularization strength"
    assert control["yaxis3"]["title"] == "validation cross-entropy (nats)"
    x, y = series(page, "control", "measured")
    assert (x, y) == ([r["step"] for r in rows if "val/ce" in r], [r["val/ce"] for r in rows if "val/ce" in r])
    by_step = {row["step"]: row for row in train}
    x, y = series(page, "control", "training batch")
    assert len(x) > 1000
    assert y == pytest.approx([by_step[at]["train/l0"] / D_SAE for at in x])
    x, y = series(page, "control", "strength")
    assert len(x) > 1000
    assert y == [by_step[at]["controller/strength"] for at in x]
    dashes = page.value(f"{plot('control')}._fullData.filter((t) => t.name === 'target').map((t) => t.line.dash)")
    assert dashes == ["5px,3px"]

    dead = drawn_axes(page, "dead_latents")
    assert dead["xaxis"]["title"] == "samples (M)"
    assert "dead window 10M samples" in page.value(f"{plot('dead_latents')}.textContent")
    x, y = series(page, "dead_latents", "dead")
    counts = {row["samples"] / 1e6: row["train/dead_latents"] for row in train}
    assert max(y) == max(counts.values()) > 0
    assert [counts[at] for at in x] == y
    rate = drawn_axes(page, "learning_rate")
    assert rate["xaxis"]["ticks"] == ["50M", "100M", "150M", "200M"]
    level = [lr for at, lr in line_on_screen(page, "learning_rate") if 10e6 < at < 100e6]
    assert len(level) > 100  # drawn point by point: joined to longer lines, a level stretch would come out tilted
    assert level == pytest.approx([6e-4] * len(level), rel=1e-3)
    dots = page.value(f"{plot('learning_rate')}._fullData[0].marker.size")
    assert dots[-1] > 0
    assert set(dots[:-1]) == {0}


def test_the_mouse_over_a_picture_shows_the_values_there(page: Browser, report: Path, rows) -> None:
    page.open(report, DRAWN)
    box = page.value(f"""(() => {{
        {plot("l0")}.scrollIntoView();
        const box = {plot("l0")}.querySelector(".nsewdrag").getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    }})()""")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    shown = f"[...{plot('l0')}.querySelectorAll('.hoverlayer text')].map((t) => t.textContent)"
    page.wait_for(f"{shown}.length > 1")
    texts = page.value(shown)
    at = float(texts[0])
    assert at == pytest.approx(100, abs=1)
    named = dict(text.split(": ") for text in texts if ": " in text)
    near = min((row for row in rows if "train/l0" in row), key=lambda row: abs(row["samples"] - 1e6 * at))
    assert float(named["set point"]) == pytest.approx(near["controller/target"], rel=1e-3)
    assert float(named["training batch"]) == pytest.approx(near["train/l0"], rel=1e-3)


def test_zoom_scale_and_theme(page: Browser, report: Path) -> None:
    page.open(report, DRAWN)
    whole = drawn_axes(page, "loss")
    page.value(f"Plotly.relayout({plot('loss')}, {{'xaxis.range': [2, 2.5]}}).then(() => null)")
    zoomed = drawn_axes(page, "loss")
    assert zoomed["xaxis2"]["range"] == zoomed["xaxis"]["range"] == [2, 2.5]  # aligned
    assert len(zoomed["xaxis"]["ticks"]) > 1
    assert zoomed["xaxis2"]["ticks"] == ["2M", "2.5M", "3M", "4M", "5M"]  # 100 to 316 steps of 16,384
    page.value(
        f"Plotly.relayout({plot('loss')}, {{'xaxis.range': {json.dumps(whole['xaxis']['range'])}}}).then(() => 0)"
    )
    assert drawn_axes(page, "loss")["xaxis"]["ticks"] == whole["xaxis"]["ticks"]
    assert drawn_axes(page, "loss")["xaxis2"]["ticks"] == whole["xaxis2"]["ticks"]

    click = "document.querySelectorAll('#l0 .scale button')[{}].click()"
    page.value(click.format(0))
    linear = drawn_axes(page, "l0")["yaxis"]
    assert linear["type"] == "linear"
    assert linear["range"][1] > 8000
    page.value(click.format(1))
    assert drawn_axes(page, "l0")["yaxis"]["type"] == "log"

    # what a click in a legend has hidden stays hidden when the theme changes
    shown = f"{plot('l0')}._fullData.filter((t) => t.visible === true && !t.meta.helper).map((t) => t.name)"
    page.value(f"Plotly.restyle({plot('l0')}, {{visible: 'legendonly'}}, [1]).then(() => null)")
    hidden = page.value(shown)
    grounds = []
    for _ in range(2):
        grounds.append(page.value(f"{plot('l0')}._fullLayout.paper_bgcolor"))
        page.value("document.getElementById('theme').click()")
        assert page.value(shown) == hidden
    assert len(set(grounds)) == 2
    assert len(hidden) == 2


def test_several_runs_in_one_page(page: Browser, folder: Path, tmp_path: Path) -> None:
    other = write_reference_run(tmp_path / "other", samples=20_000_000, controller={"target_l0": 8.0})
    page.open(write(tmp_path / "report.html", folder, other), DRAWN)
    cells = page.value("[...document.querySelectorAll('#differences tbody tr')].map((r) => "
                       "[...r.children].map((c) => c.textContent))")  # fmt: skip
    assert cells == [["controller.target_l0", "4", "8"], ["samples", "200,000,000", "20,000,000"]]
    names = page.value("[...document.querySelectorAll('#results tbody th')].map((h) => h.textContent)")
    assert names == ["target_l0=4, samples=200M", "target_l0=8, samples=20M"]
    of_run = f"{plot('l0')}.data.filter((t) => t.meta.run === %d)"
    colours = f"[...new Set({of_run}.map((t) => t.line.color))]"
    first, second = page.value(colours % 0), page.value(colours % 1)
    assert len(first) == len(second) == 1
    assert first != second
    lines = f"{plot('l0')}.querySelectorAll('.scatterlayer .trace .js-line').length"
    before = page.value(lines)
    page.value("document.querySelectorAll('.runs button')[1].click()")
    assert page.value(f"{of_run % 1}.every((t) => t.visible === false)")
    assert page.value(lines) == before - 2  # its measurement and its set point


def test_a_click_on_the_key_of_a_kind_of_line_hides_it_of_all_runs(page: Browser, folder: Path, tmp_path: Path) -> None:
    other = write_reference_run(tmp_path / "other", samples=20_000_000)
    page.open(write(tmp_path / "report.html", folder, other), DRAWN)
    shown = f"{plot('l0')}._fullData.filter((t) => t.visible === true && !t.meta.helper).map((t) => t.meta.role)"
    assert page.value(shown).count("set_point") == 2
    x, y = page.value(f"""(() => {{
        {plot("l0")}.scrollIntoView({{block: "center"}});  // not below the runs' buttons
        const key = [...{plot("l0")}.querySelectorAll(".legend .traces")].find((t) => t.textContent === "set point");
        const box = key.querySelector(".legendtoggle").getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    }})()""")
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    page.wait_for(f"!{shown}.includes('set_point')")
    assert page.value(shown).count("measured") == 2


@pytest.mark.parametrize("width", [900, 1150, 1400])
def test_nothing_stands_over_anything_else(page: Browser, report_of_few_rows: Path, width: int) -> None:
    """Titles, legends and axis titles of every picture."""
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
    page.open(report_of_few_rows, DRAWN)
    over = page.value("""(() => {
        const found = [];
        for (const plot of document.querySelectorAll(".plot")) {
            const texts = [...plot.querySelectorAll(".annotation-text, .legendtext, text[class$=title]")];
            const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, b]) => b.width > 0);
            boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
                const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (wide > 2 && high > 2) found.push([plot.parentElement.id, a, b]);
            }));
        }
        return found;
    })()""")
    page.call("Emulation.clearDeviceMetricsOverride")
    assert over == []


def test_a_page_of_a_run_with_nothing_yet(page: Browser, tmp_path: Path) -> None:
    path = write_reference_run(tmp_path / "run", samples=10 * BATCH)
    (path / "metrics.jsonl").write_text("")
    page.open(write(tmp_path / "report.html", path), DRAWN)
    assert "the run has none yet" in page.value(f"{plot('l0')}.textContent")
