"""The keys that docs/metrics.md has a line for."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented(file: str) -> set[str]:
    """Keys of a file of a run: the first cells of the tables in its section."""
    section = re.search(rf"^## {re.escape(file)}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert section is not None
    return set(re.findall(r"^\| `([^`]+)` \|", section[1], re.M))
