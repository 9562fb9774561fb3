"""What README, docs and the batch scripts say to type is what train.py and cache_activations.py take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsepilot.config.check import check, check_cache

ROOT = Path(__file__).parents[3]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "slurm").glob("*.sbatch")))
HISTORY = ("log.md", "dynamics.md")
"""They say what was typed at some commit."""
SCRIPT = re.compile(r"^#? *(?:python|torchrun|sbatch) (?:-\S+ )*(train\.py|scripts/cache_\w+\.py|slurm/\w+\.sbatch) ")
LEFT_OUT = {"data=cache": ["data.path=cache/mine", "data.sites=[model.layers.9]"], "data=lm": ["data.sites=[a]"]}
"""What `...` stands for."""
EIGHT = {"trainer.strategy.features=4": ["trainer.devices=8"]}
"""What a machine with GPUs has."""


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """("train" or "cache", overrides) of each, with comments and continued lines as a shell takes them."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if not (found := SCRIPT.match(line)):
            continue
        whole = line[found.end() :]
        while whole.rstrip().endswith("\\"):
            whole = whole.rstrip()[:-1] + next(lines).lstrip("# ")
        words = shlex.split(whole, comments=True)
        if "-m" in words:  # each list's first value
            words = [re.sub(r",[^\]}]*$", "", word) for word in words if word != "-m"]
        if "..." in words:
            words = [*words, *(more for word in words for more in LEFT_OUT.get(word, []))]
        words += [more for word in words for more in EIGHT.get(word, [])]
        yield ("cache" if "cache" in found[1] else "train"), [word for word in words if word != "..."]


CASES = [
    pytest.param(config, words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    if page.name not in HISTORY
    for config, words in commands(page)
]


@pytest.mark.parametrize(("config", "words"), CASES)
def test_it_is_taken(compose_cfg, config: str, words: list[str]) -> None:
    cfg = compose_cfg(*words, config=config)
    (check_cache if config == "cache" else check)(cfg)


def test_they_are_found() -> None:
    assert len(CASES) > 50
