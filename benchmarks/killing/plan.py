"""Which kills fall where: drawn from a seed, dealt to run folders."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from killing.runs import SAVE_STEPS, Kill

KILLS_PER_FOLDER = 5
POINTS = {
    # between the backward passes of a step (accumulation), after the optimizer, after the clock
    "mid-step": ("step-start", "mid-step", "mid-step-controller"),
    # half-way through any one write; written but not renamed; renamed; pointed at but older ones not yet removed
    "checkpoint": ("checkpoint-write", "checkpoint-write", "checkpoint-rename", "checkpoint-link", "checkpoint-linked"),
    "metrics": ("metrics-append",),
    "timing": ("timing-append",),
    # folder claimed; config.yaml half replaced; metrics cut; checkpoint read; half copied; before the first step
    "resume": ("resume-claimed", "config-write", "resume-cut", "resume-loaded", "resume-state", "step-start"),
    "early": ("mid-step",),
    "end": ("finish-dictionary",),
}
SHARES = {"checkpoint": 14, "metrics": 10, "timing": 1, "resume": 11, "early": 2, "end": 2}
"""Of 100 kills; the rest are mid-step, after the first checkpoint."""
LAST_STEP, LAST_STEP_OF_A_SAVE = 118, 90
ON_EVERY_RANK = ("step-start", "mid-step", "mid-step-controller", "resume-claimed", "resume-loaded", "resume-state")
"""Points that all ranks pass; the others are in what rank 0 alone does. Of a sharded checkpoint each writes a part."""
BETWEEN_PARTS = 0.4
"""Of kills half-way through a sharded checkpoint's writes, the share that falls on a whole part before its rename."""


@dataclass(frozen=True)
class Cell:
    """One run folder: its kills in order, then it is finished and compared."""

    name: str
    accumulate: int
    other_tmpdir: bool
    kills: tuple[Kill, ...]
    bug: str | None = None


def plan(num_kills: int, seed: int, bug: str | None = None, world: int = 1, sharded: bool = False) -> list[Cell]:
    """The cells of a campaign; the same for the same arguments.

    With several ranks (`world`) a kill hits one of them or, at a place that all of them pass, perhaps all. `sharded`:
    all of them write checkpoints.

    Every cell begins with a kill after its first checkpoint (or with an early one, before it, and then such a kill), so
    that every kill during a resume has a checkpoint to resume from.
    """
    rng = random.Random(f"{seed} {num_kills}")
    counts = {family: round(share * num_kills / 100) for family, share in SHARES.items()}
    num_mid = num_kills - sum(counts.values())
    num_cells = -(-num_kills // KILLS_PER_FOLDER)
    sizes = [num_kills // num_cells + (i < num_kills % num_cells) for i in range(num_cells)]
    first = ["early"] * counts.pop("early")
    last = ["end"] * counts.pop("end")
    middle = [family for family, count in counts.items() for _ in range(count)]
    middle += ["mid-step"] * (num_mid - num_cells)
    rng.shuffle(middle)
    turns: dict[tuple[str, int], int] = {}
    cells = []
    for i, size in enumerate(sizes):
        families = [*([first.pop()] if first else []), "mid-step"]
        ending = [last.pop()] if last and i >= num_cells // 2 else []
        while len(families) + len(ending) < size:
            families.append(middle.pop())
        accumulate = 1 + i % 2
        kills = _kills([*families, *ending], accumulate, turns, rng)
        cells.append(Cell(f"{bug or 'cell'}-{i:02d}", accumulate, i % 3 == 2, kills, bug))
    return cells if world == 1 else _with_victims(cells, world, sharded, random.Random(f"{seed} {num_kills} {world}"))


def _with_victims(cells: list[Cell], world: int, sharded: bool, rng: random.Random) -> list[Cell]:
    def with_victim(kill: Kill) -> Kill:
        if sharded and kill.point == "checkpoint-write":
            if rng.random() >= BETWEEN_PARTS:
                return replace(kill, rank=rng.randrange(world))
            kill = replace(kill, point="checkpoint-shard")
        everywhere = kill.point in (*ON_EVERY_RANK, "checkpoint-shard")
        return replace(kill, rank=rng.choice([None, *range(world)]) if everywhere else 0)

    return [replace(cell, kills=tuple(map(with_victim, cell.kills))) for cell in cells]


def _kills(
    families: list[str], accumulate: int, turns: dict[tuple[str, int], int], rng: random.Random
) -> tuple[Kill, ...]:
    aimed = sum(family not in ("early", "resume", "end") for family in families)
    steps = iter(sorted(rng.sample(range(SAVE_STEPS + 2, LAST_STEP), aimed)))
    kills = []
    for family in families:
        points = [point for point in POINTS[family] if (family, point, accumulate) not in _NO_SUCH_PLACE]
        turns[family, accumulate] = turn = turns.get((family, accumulate), rng.randrange(len(points))) + 1
        point = points[turn % len(points)]
        if family == "early":
            step = rng.randrange(1, SAVE_STEPS)
        elif family in ("resume", "end"):
            step = 0
        else:
            step = next(steps)
        if family == "checkpoint":
            step = min(step, LAST_STEP_OF_A_SAVE)
        kills.append(Kill("metrics" if family == "timing" else family, point, step, rng.random()))
    return tuple(kills)


_NO_SUCH_PLACE = {
    ("mid-step", "step-start", 1),  # with one micro-batch nothing of the step has happened there
    ("resume", "step-start", 2),  # with two, half of the first step has
}
