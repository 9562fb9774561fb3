"""The page: index.html and its data, in files that a <script> loads when they are wanted.

A page that is opened from the file system may not fetch, but may load scripts: each data file is one call of a
function of the page. What the list of all latents shows is in one of them, what a search needs in another, and all
else in chunks of CHUNK latents.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sparsepilot.analysis.features.listing import trimmed
from sparsepilot.analysis.features.records import Context, Record

PAGE = "index.html"
DATA = "data"
PARTS = "page_parts"
CHUNK = 64
_BEFORE_CHARS, _PEAK_CHARS, _AFTER_CHARS = 30, 20, 24
FIRES_ON_SHARE = 0.25
"""A search finds a latent by the token of so many of its top contexts."""


class PageWriter:
    """Writes the data of a page while latents come in order, and the page itself last.

    Args:
        folder: where it goes; `data/` is made in it.
        texts: of the tokens by id.
    """

    def __init__(self, folder: Path, texts: Sequence[str]) -> None:
        self._folder, self._texts = folder, texts
        (folder / DATA).mkdir()
        self._chunk: list[Record] = []
        self._num_chunks = 0
        self._columns: dict[str, list[float]] = {name: [] for name in ("density", "max", "score", "cosine")}
        self._previews: list[list[str]] = [[], [], []]
        self._fires_on: defaultdict[str, list[int]] = defaultdict(list)
        self._promotes: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, record: Record) -> None:
        """The next latent."""
        score = float("nan") if record.score is None else record.score
        cosine = record.nearest[0][1] if record.nearest else float("nan")
        for name, value in (("density", record.density), ("max", record.max), ("score", score), ("cosine", cosine)):
            self._columns[name].append(value)
        for part, text in zip(self._previews, self._preview(record.top[:1]), strict=True):
            part.append(text)
        peaks = Counter(_word(self._texts[each.tokens[each.peak]]) for each in record.top)
        for word, count in peaks.items():
            if count >= FIRES_ON_SHARE * len(record.top):
                self._fires_on[word].append(record.latent)
        for word in dict.fromkeys(_word(self._texts[token]) for token, _ in record.promotes):
            self._promotes[word].append(record.latent)
        self._chunk.append(record)
        if len(self._chunk) == CHUNK:
            self._flush()

    def finish(self, picked: Sequence[Record], about: Mapping[str, Any]) -> None:
        """Writes what is left: the index, the search words, the latents to open with, and the page."""
        if self._chunk:
            self._flush()
        columns = {
            name: base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
            for name, values in self._columns.items()
        }
        self._write("index", "index", {"columns": columns, "previews": self._previews, "chunk": CHUNK})
        words = sorted({*self._fires_on, *self._promotes} - {""})
        found = {
            "words": words,
            "fires": [self._fires_on.get(word, []) for word in words],
            "promotes": [self._promotes.get(word, []) for word in words],
        }
        self._write("search", "search", found)
        self._write("picked", "picked", self._pack(picked))
        filled = {
            "TITLE": escape(f"{about['run']}: features"),
            "STYLE": _part("features.css"),
            "SCRIPT": _part("features.js"),
            "ABOUT": json.dumps(about).replace("</", "<\\/"),  # "</" would end the script element
        }
        page = _part("features.html")
        pieces = [page.split("{{")[0]]
        for piece in page.split("{{")[1:]:  # each filled in once: what is filled in is not searched again
            name, _, rest = piece.partition("}}")
            pieces.append(filled[name] + rest)
        (self._folder / PAGE).write_text("".join(pieces), encoding="utf-8")

    def _flush(self) -> None:
        self._write(f"latents-{self._num_chunks}", f"latents-{self._num_chunks}", self._pack(self._chunk))
        self._chunk = []
        self._num_chunks += 1

    def _write(self, file: str, name: str, value: Any) -> None:
        # of a long text JSON.parse is far faster than the parser of scripts
        text = json.dumps(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
        (self._folder / DATA / f"{file}.js").write_text(f'arrived("{name}",JSON.parse({text}));\n', encoding="utf-8")

    def _pack(self, some: Sequence[Record]) -> dict[str, Any]:
        """Latents in short, with a vocabulary of their own: tokens are places in it, of activations those above 0."""
        places: dict[int, int] = {}

        def token(id: int) -> int:
            return places.setdefault(id, len(places))

        def context(each: Context) -> list[Any]:
            above = [x for i, value in enumerate(each.activations) if value > 0 for x in (i, value)]
            return [each.row, each.peak, [token(id) for id in each.tokens], above]

        packed = [
            {
                "id": record.latent,
                "fires": record.fires,
                "mean": record.mean,
                "histogram": trimmed(record.histogram),
                "promotes": [[token(id), logit] for id, logit in record.promotes],
                "suppresses": [[token(id), logit] for id, logit in record.suppresses],
                "nearest": record.nearest,
                "top": [context(each) for each in record.top],
                "bands": [[context(each) for each in band] for band in record.bands],
            }
            for record in some
        ]
        return {"latents": packed, "texts": [self._texts[id] for id in places]}

    def _preview(self, contexts: Sequence[Context]) -> tuple[str, str, str]:
        """The best context in short: before, peak, after."""
        if not contexts:
            return "", "", ""
        (_, peak, tokens, _) = contexts[0]
        before = "".join(self._texts[id] for id in tokens[:peak])
        after = "".join(self._texts[id] for id in tokens[peak + 1 :])
        return before[-_BEFORE_CHARS:], self._texts[tokens[peak]][:_PEAK_CHARS], after[:_AFTER_CHARS]


def _word(text: str) -> str:
    """What a token is searched by: without the space around it and in small letters; white space as it is."""
    return text.strip().casefold() or text


def _part(name: str) -> str:
    return (resources.files(__package__) / PARTS / name).read_text(encoding="utf-8")
