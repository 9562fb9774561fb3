"""What a run leaves when it is over: dictionaries for raw activations, and summaries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sparsepilot import faults
from sparsepilot.data.datamodule import RunData
from sparsepilot.interop import dictionary
from sparsepilot.interop.fold import fold
from sparsepilot.parallel.shards import gather_to_first
from sparsepilot.reporting.environment import environment
from sparsepilot.rows import read_rows, rows_of_trainee
from sparsepilot.run_folder import RunFolder, write_json
from sparsepilot.training.module import TrainingModule
from sparsepilot.training.trainee import Trainee


def finish(folder: RunFolder, module: TrainingModule, data: RunData, writes: bool) -> dict[str, Any]:
    """Writes the trained dictionary and summary.json on the rank that `writes`; all ranks call it, with their parts. Of
    several trainees, each one's go into its own folder, too."""
    names = list(module.trainees)
    for name, (prefix, trainee) in zip(names, module.each(), strict=True):
        gathered = {key: gather_to_first(tensor) for key, tensor in trainee.autoencoder.whole_tensors().items()}
        if not writes:
            continue
        tensors = {key: tensor for key, tensor in gathered.items() if tensor is not None}
        save_dictionary(folder.of_trainee(name) if prefix else folder, trainee, tensors, module.samples, data)
        faults.point("finish-dictionary")
        if prefix:
            rows = rows_of_trainee(read_rows(folder.metrics), name, names)
            write_json(folder.of_trainee(name).summary, summarise(folder, module, rows))
    if not writes:
        return {}
    summary = summarise(folder, module, read_rows(folder.metrics))
    write_json(folder.summary, summary)
    return summary


def save_dictionary(
    folder: RunFolder, trainee: Trainee, tensors: dict[str, Tensor], samples: int, data: RunData
) -> None:
    """Writes a trained dictionary, whose whole `tensors` these are, for raw activations."""
    cfg_out = {
        **trainee.autoencoder.inference_config(trainee.controller.strength),
        "sites": [site.name for site in trainee.sites.reads],
        "sites_out": [site.name for site in trainee.sites.writes or trainee.sites.reads],
        "samples": samples,
        "cache_fingerprint": data.cache.fingerprint,
        "source": data.cache.source,
        "input_scale_in_training": [site.scale for site in trainee.sites.reads],
    }
    folded = fold(cfg_out, tensors, trainee.scale_in.cpu(), trainee.scale_out.cpu())
    dictionary.save(folder.path, cfg_out, folded)


def summarise(folder: RunFolder, module: TrainingModule, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every metric, and what the run was made with."""
    metrics: dict[str, Any] = {}
    for row in rows:
        metrics.update(row)
    training_s = sum(row["elapsed_s"] for row in read_rows(folder.timing))
    return {
        "samples": module.samples,
        "steps": module.step,
        "training_s": training_s,
        "samples_per_s": module.samples / max(1e-9, training_s),
        "metrics": metrics,
        "environment": environment(),
    }
