"""Where a benchmark's JSON goes: `--json FILE`, or `-` for the screen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def put_json(found: Any, where: str) -> None:
    """Writes `found` to a file, or to the screen where that is `-`."""
    text = json.dumps(found, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        Path(where).write_text(text, encoding="utf-8")
