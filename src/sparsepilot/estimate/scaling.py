"""docs/scaling.md: which trainer for which dictionary on how many GPUs, from the formulas alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sparsepilot.estimate.devices import DEVICES
from sparsepilot.estimate.job import Job, read_job
from sparsepilot.estimate.needs import rank_memory
from sparsepilot.estimate.parameters import dictionary_counts
from sparsepilot.estimate.report import compose_config, size_text
from sparsepilot.estimate.rows import Data
from sparsepilot.estimate.traffic import sent_per_step
from sparsepilot.estimate.wanted import Wanted
from sparsepilot.estimate.world import World

WIDTHS = (2304, 4096, 8192)
LATENTS = (2**14, 2**16, 2**18, 2**20, 2**22, 2**24)
RANKS = (1, 8, 64, 1024)
PER_MACHINE = 8
BATCH = 65_536
K = 64
DEVICE = "h100"
ROOM = 0.9
"""Of a GPU's memory, what an estimate may come to."""
DEAD = 0.01

HEAD = """\
# Scaling on paper

```
python scripts/estimate.py scaling=docs/scaling.md
```

writes this page, and a test holds it to that. It is arithmetic, not measurement: the formulas of
`src/sparsepilot/estimate/`, whose memory is tested against processes on CPU. No row has been run at these sizes. A
job of your own: `python scripts/estimate.py model=... data=... trainer=... devices=64 nodes=8 device=h100`.

For each width of the activations, number of latents and number of GPUs, {per_machine} to a machine: the memory of one
GPU and the bytes that it sends in an optimizer step. TopK, k {k}, a batch of {batch:,} rows over all GPUs, fp32
parameters with Adam, {dead:.0%} of the latents dead for AuxK, no accumulation. **Bold** is the trainer to use: of
those that come to at most {room:.0%} of an {title}'s {memory:.0f} GB, the one that sends least. (In brackets: does
not fit.) A line without one needs the GPUs of a line below it.

| trainer | a GPU holds | and sends in a step |
|---|---|---|
| `gpu` | the whole dictionary | nothing |
| `ddp` | the whole dictionary | gradients: grows with d_sae, not with the batch |
| `fsdp` | its share of all state; in a step all of it and its gradient | as much: it gathers the dictionary |
| `feature_parallel` | its share of the latents | candidates, partial reconstructions: grows with the batch, not d_sae |
| the same, features={per_machine} | a machine's share of the latents; machines read different rows | some of both |

What decides: a gradient has 2 d_sae d_model numbers, the reconstructions of a batch have batch d_model. Where the
rows of a group are fewer than its latents, sharing latents is cheaper than sharing gradients. `gradients=bfloat16`
halves what `ddp` sends. FSDP divides what lasts from step to step, not what a step needs: where the dictionary and
its gradient, the latter twice, do not fit on one GPU, it does not help.

What goes from machine to machine is slower than what stays in one; where two trainers send about as much, take the one
that shares latents within a machine.

Not in these figures: a language model that runs beside it, cross-entropy with the reconstruction spliced in, NCCL's
buffers.
[parallel.md](parallel.md) says how each trainer works.
"""


class Way(NamedTuple):
    """A trainer and how it is set."""

    title: str
    world: World


def page(conf: Path) -> str:
    """The whole page; `conf` is the folder of the configuration."""
    words = ["model=topk", f"model.k={K}", "data=cache", f"batch={BATCH}", "data.num_streams=1024", "trainer=gpu"]
    base = read_job(compose_config(conf, [*words, f"samples={10**9}"]), Wanted(devices=1, d_in=WIDTHS[0], dead=DEAD))
    known = DEVICES[DEVICE]
    head = HEAD.format(
        per_machine=PER_MACHINE, k=K, batch=BATCH, dead=DEAD, room=ROOM, title=known.title,
        memory=known.memory_bytes / 1e9,
    )  # fmt: skip
    return head + "".join(_section(base, width) for width in WIDTHS)


def _section(base: Job, width: int) -> str:
    lines = [
        f"\n## d_model {width}\n",
        f"| d_sae | GPUs | gpu, ddp | fsdp | feature_parallel | features={PER_MACHINE} |",
        "|---" * 6 + "|",
    ]
    for latents in LATENTS:
        for ranks in RANKS:
            found = {way.title: _figures(_sized(base, width, latents, way.world)) for way in _ways(ranks)}
            fitting = {title: sent for title, (size, sent) in found.items() if size <= _room()}
            best = min(fitting, key=lambda title: fitting[title], default=None)
            cells = [_cell(found.get(title), title == best) for title in TITLES]
            lines.append(f"| {latents:,} | {ranks:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


TITLES = ("whole", "fsdp", "features", "features in a machine")


def _ways(ranks: int) -> list[Way]:
    nodes = max(1, ranks // PER_MACHINE)
    if ranks == 1:
        return [Way("whole", World("one", 1, 1, 1, False, False))]
    ways = [
        Way("whole", World("ddp", ranks, nodes, 1, False, False)),
        Way("fsdp", World("fsdp", ranks, nodes, 1, False, False)),
        Way("features", World("feature_parallel", ranks, nodes, ranks, False, False)),
    ]
    if nodes > 1:
        ways.append(Way("features in a machine", World("feature_parallel", ranks, nodes, PER_MACHINE, False, False)))
    return ways


def _sized(base: Job, width: int, latents: int, world: World) -> Job:
    """The same job with another dictionary on other ranks."""
    [d] = base.dictionaries
    data: Data = base.data
    narrow = sum(data.widths.values())
    sized = d._replace(
        d_in=width, d_out=width, width=width, d_sae=latents, counts=dictionary_counts(latents, width, width),
        matrix_shapes=((latents, width),) * 2, aux_k=width // 2,
    )  # fmt: skip
    return replace(
        base,
        dictionaries=(sized,),
        world=world,
        saved_buffer_bytes=8 * latents,
        data=data._replace(
            widths=dict.fromkeys(data.widths, width),
            row_bytes=data.row_bytes * width // narrow,
            batch_row_bytes=data.batch_row_bytes * width // narrow,
        ),
    )


def _figures(job: Job) -> tuple[int, float]:
    return rank_memory(job).device.total, sum(sent_per_step(job).values())


def _room() -> float:
    return ROOM * DEVICES[DEVICE].memory_bytes


def _cell(figures: tuple[int, float] | None, best: bool) -> str:
    if figures is None:
        return ""
    size, sent = figures
    text = f"{size / 1e9:,.1f} GB, {size_text(sent)}" if sent else f"{size / 1e9:,.1f} GB"
    if size > _room():
        return f"({text})"
    return f"**{text}**" if best else text
