"""report.html: one file with every picture, that opens from the file system and asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from omegaconf import OmegaConf

from sparsepilot.reporting import labels
from sparsepilot.reporting.as_plotly import figure
from sparsepilot.reporting.figure import Picture
from sparsepilot.reporting.runs import Run
from sparsepilot.reporting.style import PALETTE
from sparsepilot.reporting.tables import Table, configuration_differences, results
from sparsepilot.run_folder import replacing

PAGE = "report.html"
PARTS = "page_parts"
FEW_ROWS = 8


def write_page(
    pictures: Sequence[Picture],
    runs: Sequence[Run],
    names: Sequence[str],
    path: Path,
    table: Table | None = None,
    title: str | None = None,
) -> Path:
    """Writes the page. The plotting library (plotly.js) is put into it once."""
    from plotly.offline import get_plotlyjs

    title = title or (labels.title(runs, names) if runs else pictures[0].title)
    data = [{"name": picture.name, "title": picture.title, **figure(picture)} for picture in pictures]
    filled = {
        "TITLE": escape(title),
        "HEADER": _header(title, runs, names, table),
        "CARDS": "\n".join(_card(picture, span) for picture, span in zip(pictures, spans(pictures), strict=True)),
        "FOOT": _foot(runs, names),
        "STYLE": _part("page.css"),
        "SCRIPT": _part("page.js"),
        # "</" would end the script element
        "DATA": json.dumps({"pictures": data, "runs": len(runs)}, allow_nan=False).replace("</", "<\\/"),
        "PLOTLY": get_plotlyjs().replace("</script", "<\\/script"),
    }
    page = _part("page.html")
    with replacing(path) as file:
        for piece in page.split("{{"):  # each filled in once: what is filled in is not searched again
            name, found, rest = piece.partition("}}")
            file.write(filled[name] + rest if found else piece)
    return path


def _part(name: str) -> str:
    return (resources.files(__package__) / PARTS / name).read_text(encoding="utf-8")


def _header(title: str, runs: Sequence[Run], names: Sequence[str], given: Table | None) -> str:
    if not runs:
        return f"<h1>{escape(title)}</h1>\n" + (_table(given, "results", chips=True) if given else "")
    table = given or results(runs, names)
    if len(runs) == 1 and not given:
        numbers = zip(table.head[1:], table.rows[0][1:], strict=True)
        tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in numbers)
        return f'<h1>{escape(title)}</h1>\n<dl class="tiles">{tiles}</dl>'
    differing = configuration_differences(runs, names)
    return (
        f"<h1>{escape(title)}</h1>\n"
        + _table(table, "results", chips=True)
        + (
            f"<details{' open' if len(differing.rows) <= FEW_ROWS else ''}><summary>what differs</summary>\n"
            f"{_table(differing, 'differences', chips=False)}</details>"
            if differing.rows
            else ""
        )
        + f'<div class="runs">{"".join(_run_button(i, name) for i, name in enumerate(names))}</div>'
    )


def _run_button(run: int, name: str) -> str:
    return f'<button type="button" data-run="{run}" aria-pressed="true">{_chip(run)}{escape(name)}</button>'


def _chip(run: int) -> str:
    colour = PALETTE[run % len(PALETTE)]
    return f'<i class="chip" style="--light:{colour.light};--dark:{colour.dark}"></i>'


def _table(table: Table, name: str, chips: bool) -> str:
    head = "".join(
        f'<th scope="col">{"" if chips or i == 0 else _chip(i - 1)}{escape(text)}</th>'
        for i, text in enumerate(table.head)
    )
    body = "".join(
        f'<tr><th scope="row">{_chip(run) if chips and run is not None else ""}{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for run, row in zip(table.runs or range(len(table.rows)), table.rows, strict=True)
    )
    return (
        f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def spans(pictures: Sequence[Picture]) -> list[int]:
    """How many of the page's six columns each picture takes: half a row, two thirds, or all, so that rows are full.

    >>> one, two, three = (Picture("", "", [None] * n) for n in (1, 2, 3))
    >>> spans([one, one, three, two, one, one])
    [3, 3, 6, 4, 2, 6]
    """
    taken: list[int] = []
    for i, picture in enumerate(pictures):
        wanted = {1: 3, 2: 4}.get(len(picture.panels), 6)
        left = 6 - sum(taken) % 6
        alone = left == 6 and (i + 1 == len(pictures) or len(pictures[i + 1].panels) > 1)
        taken.append(6 if alone else left if left < 6 and len(picture.panels) == 1 else wanted)
    return taken


def _card(picture: Picture, span: int) -> str:
    notes = [f"{panel.title or picture.title}: {note}." for panel in picture.panels for note in panel.notes]
    thinned = [line for panel in picture.panels for line in panel.lines if line.num_points]
    if thinned:
        longest = max(thinned, key=lambda line: line.num_points)
        notes.append(
            f"{longest.num_points:,} points are drawn as {len(longest.x):,}: the least and the greatest of each "
            "stretch of the axis, so noise keeps its width and a spike its height."
        )
    return (
        f'<section class="card" style="--span:{span};--panels:{len(picture.panels)}" id="{picture.name}">'
        f"<header><h2>{escape(picture.title)}</h2>"
        f'<div class="scale" role="group" aria-label="scale of the y axis"><span>y</span></div></header>'
        f'<div class="plot"></div>{"".join(f"<p>{escape(note)}</p>" for note in notes)}</section>'
    )


def _foot(runs: Sequence[Run], names: Sequence[str]) -> str:
    return "\n".join(
        f"<details><summary>configuration of {escape(name)}</summary>"
        f"<pre>{escape(OmegaConf.to_yaml(OmegaConf.create(run.config)))}</pre></details>"
        for run, name in zip(runs, names, strict=True)
    )
