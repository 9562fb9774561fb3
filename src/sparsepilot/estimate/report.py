"""An estimate as plain values, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from pydantic import Field, PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsepilot.config.plain import plain_values
from sparsepilot.config.resolvers import register_resolvers
from sparsepilot.config.schema import register
from sparsepilot.config.signature import check_fields
from sparsepilot.data.together import open_sites
from sparsepilot.errors import ConfigError
from sparsepilot.estimate.calibration import FEWEST_LATENTS, Calibration, fewest_latents
from sparsepilot.estimate.devices import NODE_BANDWIDTH, Device, Efficiency, device
from sparsepilot.estimate.job import Job, read_job
from sparsepilot.estimate.needs import disk_needs, rank_memory, step_time
from sparsepilot.estimate.speed import from_corners
from sparsepilot.estimate.traffic import sent_per_step
from sparsepilot.estimate.wanted import Wanted
from sparsepilot.process import prepare_process

ROUNDS = 6
"""Steps of each corner in a calibration, the first of which does not count."""


def compose_config(conf: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration as train.py would see it."""
    register()
    register_resolvers()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def estimate(cfg: DictConfig, options: Mapping[str, Any], calibrate: bool = False) -> dict[str, Any]:
    """Everything, as JSON values; sizes in bytes, times in seconds.

    Args:
        cfg: a configuration of train.py.
        options: fields of `Wanted`.
        calibrate: time a few smaller steps on this machine.

    Raises:
        SparsepilotError: where the configuration, or an option, is wrong.
    """
    try:
        check_fields("estimate", options, _options)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("estimate.")) from None
    wanted = Wanted(**options)
    known = None if wanted.device is None else device(wanted.device)
    if calibrate and known is not None:
        raise ConfigError(f"device = {wanted.device}: a calibration is of this machine; leave out one of the two")
    job = read_job(cfg, wanted)
    memory = rank_memory(job)
    sent = sent_per_step(job)
    found: dict[str, Any] = {
        "dictionaries": [
            {"name": d.name, "architecture": d.architecture, "d_in": d.d_in, "d_out": d.d_out, "d_sae": d.d_sae,
             "parameters": d.counts.total, "active": d.pairs_per_row, "starts_dense": d.starts_dense,
             "stays_dense": d.stays_dense}
            for d in job.dictionaries
        ],
        "parameters": job.parameters,
        "world": {**job.world._asdict(), "data_ranks": job.world.data_ranks, "rows_per_rank": job.rank_rows},
        "memory_bytes": memory.device.to_json(),
        "host_memory_bytes": None if memory.host is None else memory.host.to_json(),
        "disk_bytes": disk_needs(job),
        "sent_bytes_per_rank_and_step": {**sent, "total": sum(sent.values())},
        "budget": {"samples": job.samples, "batch": job.batch, "steps": -(-job.samples // job.batch)},
        "time": None,
        "notes": list(job.notes),
    }  # fmt: skip
    if known is not None:
        found["time"] = _by_data_sheet(job, known)
        found["fits"] = memory.device.total <= known.memory_bytes
    elif calibrate:
        found["time"] = _by_calibration(cfg, job)
    return found


def _options(
    devices: PositiveInt | None = None,
    nodes: PositiveInt | None = None,
    device: str | None = None,
    d_in: PositiveInt | None = None,
    rows: PositiveInt | None = None,
    l0: PositiveFloat | None = None,
    dead: Annotated[float, Field(ge=0, le=1)] = 0.1,
) -> None:
    """The signature of the script's own fields."""


def _by_data_sheet(job: Job, known: Device) -> dict[str, Any]:
    efficiency = Efficiency()
    parts = step_time(job, known, efficiency)
    return {
        "from": f"data sheet of {known.title} ({known.source})",
        "assumed": {**efficiency._asdict(), "node_bytes_per_s": NODE_BANDWIDTH},
        "step_parts_s": parts._asdict(),
        **_pace(job, parts.total_s),
    }


def _by_calibration(cfg: DictConfig, job: Job) -> dict[str, Any]:
    prepare_process(cfg)
    where = "cuda" if job.cuda else "cpu"
    if job.cuda and not torch.cuda.is_available():
        raise ConfigError("calibrate = True: there is no GPU here; give device=... for a data sheet's")
    if job.world.features > 1:
        raise ConfigError("calibrate = True: a step with shared latents cannot be timed on one rank; give device=...")
    if len(job.dictionaries) > 1:
        raise ConfigError("calibrate = True: several trainees are not timed together; give each by itself")
    [d] = job.dictionaries
    settled = None if d.stays_dense else d.pairs_per_row
    fewest = FEWEST_LATENTS if d.stays_dense else fewest_latents(d.pairs_per_row, d.dense_above)
    calibration = Calibration(cfg, job.data.widths, job.rank_rows, settled, where, _rows(cfg, job), fewest)
    for _ in range(ROUNDS):
        calibration.round()
    corners = calibration.corners()
    seconds = job.micro_batches * from_corners(corners, job.rank_rows, d.d_sae)
    return {
        "from": "steps of smaller sizes on this machine, without traffic between ranks",
        "corners": [corner._asdict() for corner in corners],
        **_pace(job, seconds),
    }


def _rows(cfg: DictConfig, job: Job) -> Tensor | None:
    """Rows of the cache, where it is there: how many latents are close to the k-th one depends on them."""
    if job.data.cache_bytes is None:
        return None
    path = plain_values(cfg)["data"]["path"]
    cache = open_sites(path, list(job.data.widths))
    count = min(job.rank_rows, cache.num_train_rows)
    x_BD = torch.cat([cache.read(site, 0, count) for site in job.data.widths], dim=1)
    return x_BD.repeat(-(-job.rank_rows // count), 1)


def _pace(job: Job, step_s: float) -> dict[str, float]:
    return {
        "step_s": step_s,
        "samples_per_s": job.batch / step_s,
        "hours": -(-job.samples // job.batch) * step_s / 3600,
    }


# ---------------------------------------------------------------------------------------------------- for people


def print_estimate(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Tables of an estimate."""
    console = console or Console(soft_wrap=True)
    world, budget = found["world"], found["budget"]
    table = Table(title="estimate", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("parameters", f"{found['parameters']:,}")
    if world["ranks"] > 1:
        features = f", {world['features']} to a dictionary" if world["features"] > 1 else ""
        table.add_row("ranks", f"{world['ranks']} on {world['nodes']} ({world['kind']}{features})")
    table.add_row("rows of a micro-batch on a rank", f"{world['rows_per_rank']:,}")
    table.add_section()
    _memory_rows(table, "memory of a rank", found["memory_bytes"])
    if found["host_memory_bytes"] is not None:
        table.add_section()
        _memory_rows(table, "memory of its host", found["host_memory_bytes"])
    table.add_section()
    for name, size in found["disk_bytes"].items():
        table.add_row(f"on disk: {name}", size_text(size))
    sent = found["sent_bytes_per_rank_and_step"]
    if sent["total"]:
        table.add_section()
        for name, size in sent.items():
            if name != "total":
                table.add_row(f"sent by a rank in a step: {name}", size_text(size))
        table.add_row("sent by a rank in a step", size_text(sent["total"]))
    table.add_section()
    table.add_row("budget", f"{budget['samples']:,} samples, {budget['steps']:,} steps")
    if found["time"] is not None:
        table.add_row("a step", f"{found['time']['step_s']:.3g} s")
        table.add_row("samples/s", f"{found['time']['samples_per_s']:,.0f}")
        table.add_row("hours", f"{found['time']['hours']:,.2f}")
    console.print(table)
    for line in _remarks(found):
        console.print(line, highlight=False, markup=False)


def _memory_rows(table: Table, title: str, parts: Mapping[str, Any]) -> None:
    for name, size in parts["lasting"].items():
        table.add_row(f"  {name}", size_text(size))
    largest = max(parts["passing"].values(), default=0)
    for name, size in parts["passing"].items():
        table.add_row(f"  {'+' if size == largest else 'or'} {name}", size_text(size))
    if parts["at_end"]:
        table.add_row("  or, at the end, the dictionary for raw activations", size_text(parts["at_end"]))
    if parts["held_by_allocator"]:
        table.add_row("  held by the allocator", size_text(parts["held_by_allocator"]))
    table.add_row("  the process itself", size_text(parts["base"]))
    table.add_row(title, size_text(parts["total"]))


def _remarks(found: Mapping[str, Any]) -> list[str]:
    lines = [f"note: {note}" for note in found["notes"]]
    time = found["time"]
    if time is None:
        lines.append("for samples/s and hours: calibrate=true (times smaller steps here) or device=h100 (a data sheet)")
        return lines
    lines.append(f"time: from {time['from']}")
    if "assumed" in time:
        a = time["assumed"]
        lines.append(
            f"assumed, not measured: {a['products']:.0%} of its FLOP/s, {a['memory']:.0%} of its memory's and "
            f"{a['links']:.0%} of its links' bytes/s, {a['launch_s'] * 1e3:g} ms of launches per micro-batch, "
            f"{a['node_bytes_per_s'] / 1e9:g} GB/s per GPU between machines, nothing overlapping"
        )
        if not found["fits"]:
            lines.append("it does not fit into that device's memory")
    return lines


def size_text(size: float) -> str:
    """Bytes in the largest unit of 1024 that leaves a number of at least 1.

    >>> size_text(900), size_text(3 * 2**20), size_text(1.5 * 2**40)
    ('900 B', '3.0 MiB', '1.5 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError
