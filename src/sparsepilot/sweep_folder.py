"""What lies where in the folder of a sweep, and how each of its members stands.

A member is one run of several that a command line asks for. Whoever trains it keeps its record, so that the folder
alone says how the sweep stands, whether its members run here one after the other or as jobs of a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sparsepilot.run_folder import write_json

Status = Literal["waiting", "running", "done", "failed", "stopped", "requeued"]
"""`stopped`: by a signal, saved; `requeued`: the same, and it is in Slurm's queue again"""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    number: int
    overrides: Sequence[str]
    """all of the command line's, `field=value`"""
    run_dir: str
    """empty until it has started"""
    status: Status = "waiting"
    error: str | None = None
    """the line that a user reads"""

    def told(self) -> str:
        """How it is called: `member 3 (optimizer.lr=0.001, seed=1)`."""
        return f"member {self.number} ({', '.join(self.overrides)})"


class SweepFolder:
    """Paths of one sweep.

    <number>/               run folder of a member
    members/<number>.json   what was asked of it, and how it stands
    multirun.yaml           the configuration of the whole, as Hydra keeps it
    report/                 the table of all members as CSV, the pictures and the page
    .submitit/<job>/        what a member's job on a cluster printed
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.report = self.path / "report"
        self._records = self.path / "members"

    @property
    def name(self) -> str:
        """What W&B groups its members by."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a sweep was begun here."""
        return self._records.is_dir()

    def members(self) -> list[Member]:
        """All that are known, in the order of their numbers."""
        return sorted(self._read(), key=lambda member: member.number)

    def member(self, number: int) -> Member:
        """One of them."""
        return Member(**json.loads(self._record(number).read_text(encoding="utf-8")))

    def write(self, member: Member) -> None:
        """Keeps a member's record."""
        self._records.mkdir(parents=True, exist_ok=True)
        write_json(self._record(member.number), asdict(member))

    def mark(self, number: int, status: Status, error: str | None = None) -> None:
        """Changes how a member stands."""
        self.write(replace(self.member(number), status=status, error=error))

    def _read(self) -> Iterator[Member]:
        for path in self._records.glob("*.json"):
            yield self.member(int(path.stem))

    def _record(self, number: int) -> Path:
        return self._records / f"{number}.json"


class Place(NamedTuple):
    """A member of a sweep."""

    sweep: str
    """the folder"""
    number: int


told_place: list[Place] = []
"""In a process that another one has started for a member: which."""


def place_here() -> Place | None:
    """The member of a sweep that this process trains at the moment; None where it trains a run by itself."""
    if told_place:
        return told_place[-1]
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    hydra = HydraConfig.get()
    return Place(str(hydra.sweep.dir), int(hydra.job.num))


def differing(members: Sequence[Member]) -> list[list[str]]:
    """Of each member the overrides that not all of them have.

    >>> differing([Member(0, ["seed=1", "model.k=8"], ""), Member(1, ["seed=1", "model.k=16"], "")])
    [['model.k=8'], ['model.k=16']]
    """
    common = set.intersection(*(set(member.overrides) for member in members)) if len(members) > 1 else set()
    return [[word for word in member.overrides if word not in common] for member in members]
