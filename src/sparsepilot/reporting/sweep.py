"""A sweep as its folder tells it: a table of all members, those that failed too, and what sparsity costs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsepilot.errors import ConfigError
from sparsepilot.reporting.figure import Line, Panel, Picture
from sparsepilot.reporting.report import draw_pictures, write_pictures
from sparsepilot.reporting.runs import Run, read_runs
from sparsepilot.reporting.tables import Table, results, samples_per_s
from sparsepilot.run_folder import RunFolder, replacing
from sparsepilot.sweep_folder import Member, SweepFolder, differing

TABLE = "members.csv"
MEASURED = {
    "l0": "val/l0",
    "fvu": "val/fvu",
    "ce": "val/ce",
    "ce_recovered": "val/ce_recovered",
    "dead_latents": "train/dead_latents",
    "samples": "samples",
}
"""Columns of the CSV file, and the keys whose last values they hold."""
SPARSITY = (
    "model.k",
    "model.coefficient",
    "model.target_l0",
    "controller.target_l0",
    "controller.target",
    "controller.strength",
    "controller.end",
)
"""Fields by which a run is made sparser; members that differ in nothing else lie on one line."""


@dataclass(frozen=True)
class Row:
    """A member, with one of the dictionaries that it trains, where it has come as far."""

    member: Member
    words: Sequence[str]
    """the overrides that not all members have"""
    run: Run | None
    num_starts: int

    @property
    def fields(self) -> dict[str, str]:
        """{"model.k": "8"}"""
        return {_field(word): word.partition("=")[2] for word in self.words}


def write_sweep_report(sweep: SweepFolder, out: Path) -> Path:
    """Writes the table as CSV, every picture of the members over one another, and the page; returns the page.

    Raises:
        ConfigError: where no sweep lies there.
    """
    rows = read_sweep(sweep)
    out.mkdir(parents=True, exist_ok=True)
    write_table(rows, out / TABLE)
    runs = [row.run for row in rows if row.run is not None]
    names = [member_name(row) for row in rows if row.run is not None]
    drawn = draw_pictures(runs, names) if runs else []
    pictures = [joined(picture, rows) for picture in drawn if picture.name == "frontier"]
    pictures += [picture for picture in drawn if picture.name != "frontier"]
    return write_pictures(pictures, runs, names, out, members_table(rows), title=f"sweep {sweep.name}")


def read_sweep(sweep: SweepFolder) -> list[Row]:
    """All members in order.

    Raises:
        ConfigError: where no sweep lies there.
    """
    if not sweep.exists():
        raise ConfigError(f"sweep_dir = {sweep.path}: there is no sweep here (no folder {sweep.path}/members)")
    members = sweep.members()
    return [
        row for member, words in zip(members, differing(members), strict=True) for row in _rows(sweep, member, words)
    ]


def _rows(sweep: SweepFolder, member: Member, words: Sequence[str]) -> Iterator[Row]:
    own = RunFolder(sweep.path / Path(member.run_dir).name)  # where it lies now, should the sweep have been moved
    folder = own if own.exists() else RunFolder(member.run_dir)
    if not member.run_dir or not folder.exists():
        yield Row(member, words, None, 0)
        return
    identity = json.loads(folder.identity.read_text(encoding="utf-8")) if folder.identity.exists() else {}
    for run in read_runs(folder):
        yield Row(member, words, run, len(identity.get("starts", [])))


def write_table(rows: Sequence[Row], path: Path) -> None:
    """One line per member, numbers as they were measured, nothing where a member has none."""
    fields = _all_fields(rows)
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        several = ["trainee"] if _has_trainees(rows) else []
        writer.writerow(
            ["member", *several, *fields, *MEASURED, "samples_per_s", "starts", "status", "error", "folder"]
        )
        for row in rows:
            measured = [row.run.last(key) if row.run else None for key in MEASURED.values()]
            speed = samples_per_s(row.run) if row.run else None
            told = (speed, row.num_starts, row.member.status, row.member.error, row.run.name if row.run else None)
            trainee = [row.run.trainee if row.run else None for _ in several]
            writer.writerow([row.member.number, *trainee, *(row.fields.get(name) for name in fields), *measured, *told])


def members_table(rows: Sequence[Row]) -> Table:
    """The same for the page: numbers short, empty columns left out."""
    runs = [row.run for row in rows if row.run is not None]
    measured = results(runs, [""] * len(runs))
    fields = _all_fields(rows)
    requeued = any(row.num_starts > 1 for row in rows)
    failed = any(row.member.error for row in rows)
    several = _has_trainees(rows)
    cells, numbers, place = [], [], 0
    for row in rows:
        numbers.append(place if row.run else None)
        values = measured.rows[place][1:] if row.run else ["-"] * (len(measured.head) - 1)
        place += row.run is not None
        cells.append([
            str(row.member.number), *([(row.run and row.run.trainee) or "-"] if several else []),
            *(row.fields.get(name, "-") for name in fields), *values,
            *([str(row.num_starts)] if requeued else []), row.member.status,
            *([row.member.error or ""] if failed else []),
        ])  # fmt: skip
    head = [
        "member",
        *["trainee"] * several,
        *fields,
        *measured.head[1:],
        *["starts"] * requeued,
        "status",
        *["error"] * failed,
    ]
    return Table(head, cells, numbers)


def joined(frontier: Picture, rows: Sequence[Row]) -> Picture:
    """The ends of the members with a line through those that differ only in how sparse they were made; of members that
    train several dictionaries, a line for each of these."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(row for row in rows if row.run is not None):
        if row.fields.keys() & set(SPARSITY):
            rest = [word for word in row.words if _field(word) not in SPARSITY]
            trainee = [row.run.trainee] if row.run and row.run.trainee else []
            groups.setdefault((*rest, *trainee), []).append(place)
    panels = [_with_lines(panel, groups) for panel in frontier.panels]
    return replace(frontier, title="Frontier of the sweep", panels=panels)


def _with_lines(panel: Panel, groups: dict[tuple[str, ...], list[int]]) -> Panel:
    ends = {line.run: (line.x[-1], line.y[-1]) for line in panel.lines if line.role == "validation" and line.x}
    lines = []
    for words, places in groups.items():
        points = sorted(ends[place] for place in places if place in ends)
        if len(points) > 1:
            name = ", ".join(words) or "members"
            lines.append(Line(name, "measured", [p[0] for p in points], [p[1] for p in points], run=-1))
    return replace(panel, lines=[*lines, *panel.lines])


def member_name(row: Row) -> str:
    """What a member, or a trainee of one, is called beside the others."""
    assert row.run is not None
    short = [f"{name.rpartition('.')[2]}={value}" for name, value in row.fields.items()]
    return f"{row.member.number}: {', '.join([*short, *([row.run.trainee] if row.run.trainee else [])])}"


def _field(word: str) -> str:
    """The field that an override sets: `model.k` of `+model.k=8`."""
    return word.lstrip("+~").partition("=")[0]


def _has_trainees(rows: Sequence[Row]) -> bool:
    return any(row.run is not None and row.run.trainee is not None for row in rows)


def _all_fields(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.fields))
