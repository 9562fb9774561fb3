"""docs/tree.md names every file of the package and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tree_is_complete() -> None:
    tree = re.search(r"## Every file\n+```\n(.*?)```", (ROOT / "docs" / "tree.md").read_text(), re.S)
    assert tree is not None
    part = tree[1].partition("src/sparsepilot/")[2].partition("\ntests/")[0]
    folder, named = "", set()
    for line in part.splitlines():
        if match := re.match(r"  (\w+)/$", line):
            folder = match[1] + "/"
            continue
        indent = "" if line.startswith("  ") and not line.startswith("    ") else folder
        named |= {indent + name for name in re.findall(r"(?<!\S)[\w/]+\.py(?!\S)", line)}
    package = ROOT / "src" / "sparsepilot"
    there = {str(p.relative_to(package)) for p in package.rglob("*.py") if p.name != "__init__.py"}
    assert named == there
