"""A run as a member of a sweep: one that fails is noted and does not stop the others; at the end all is told."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sparsepilot import launch, slurm
from sparsepilot.errors import CheckpointError
from sparsepilot.ranks import is_first
from sparsepilot.sweep_folder import Member, Place, SweepFolder, differing, place_here

led: list[Place] = []
"""Members that this process has trained, or has had a cluster train."""


class Record:
    """What this process notes about the member that it trains.

    Of several ranks the first one does, or the process that has started them; what only one of them knows of an
    error, that one notes.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._sweep = SweepFolder(place.sweep)
        self._notes = is_first() and launch.handed is None

    def begin(self, cfg: DictConfig) -> None:
        """It starts, perhaps not for the first time."""
        if self._notes:
            if not slurm.by_submitit():
                led.append(self.place)
            overrides = [str(word) for word in HydraConfig.get().overrides.task]
            self._sweep.write(Member(self.place.number, overrides, str(cfg.run_dir), "running"))

    def done(self) -> None:
        """It has ended well."""
        if self._notes:
            self._sweep.mark(self.place.number, "done")

    def failed(self, line: str, knows: bool) -> bool:
        """It has ended with an error; where another process knows more of it (`knows` is false), that stays.

        Returns:
            Whether this is news.
        """
        with contextlib.suppress(OSError, CheckpointError):  # of a full disk the user is told on the screen
            if not knows and self._sweep.member(self.place.number).error is not None:
                return False
            if knows or self._notes:
                self._sweep.mark(self.place.number, "failed", line)
        return True

    def left(self) -> None:
        """A signal has ended it, with everything saved."""
        with contextlib.suppress(OSError, CheckpointError):
            if slurm.queued_again:
                self._sweep.mark(self.place.number, "requeued")
            elif self._notes and self._sweep.member(self.place.number).status != "requeued":
                self._sweep.mark(self.place.number, "stopped")
                if not slurm.by_submitit():
                    print(
                        f"the sweep ends here; the same line with hydra.sweep.dir={self._sweep.path} goes on",
                        flush=True,
                    )


def note_folder(run_dir: str) -> None:
    """Notes where the member that is trained here lies, once that is known: `resume=never` may find another folder than
    the one asked for. To be called by the rank that writes; the process that has started it does not know."""
    place = place_here()
    if place is None:
        return
    sweep = SweepFolder(place.sweep)
    with contextlib.suppress(FileNotFoundError):  # of a sweep that train.py has not started nobody keeps a record
        sweep.write(replace(sweep.member(place.number), run_dir=run_dir))


def conclude(led: Sequence[Place]) -> None:
    """Says at the end of a sweep how its members stand, a line for each that is not done.

    Raises:
        SystemExit: with status 1 where one is not done.
    """
    if not led:
        return
    sweep = SweepFolder(led[0].sweep)
    members = [sweep.member(place.number) for place in led]
    done = [member for member in members if member.status == "done"]
    print(f"sweep {sweep.path}: {len(done)} of {len(members)} members are done")
    print(f"  python scripts/report.py sweep_dir={sweep.path}   # a table of all, and what sparsity costs")
    sys.stdout.flush()
    for member, words in zip(members, differing(members), strict=True):
        if member.status != "done":
            why = member.error or f"run_dir={member.run_dir}"
            print(f"{member.status}: {replace(member, overrides=words).told()}: {why}", file=sys.stderr)
    if len(done) < len(members):
        raise SystemExit(1)
