"""What differs between runs, and what each is called for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsepilot.reporting.runs import Run
from sparsepilot.reporting.ticks import number_text, samples_text

NOT_A_DIFFERENCE = ("run_dir", "logger", "trainer", "resume", "check", "report", "threads", "callbacks", "lm.device",
                    "lm.install", "lm.keep_converted", "data.lm_device")  # fmt: skip
"""Where runs lie and how they are kept and timed; what they compute is the same."""
BUT_THESE = ("callbacks.disturb", "trainer.precision")
CACHE = "cache"
"""A cache's fingerprint, which says what its folder's name cannot."""

MOST_IN_A_LABEL = 4


class Difference(NamedTuple):
    """One field and its value in each run, None where a run has no such field."""

    field: str
    values: Sequence[Any]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """The fields in which the runs' configurations differ, in the order in which the configuration has them."""
    flat = [flatten(run.config) for run in runs]
    if all(run.cache_fingerprint for run in runs):
        flat = [
            {field: value for field, value in one.items() if not _within(field, ("data.path",))}
            | {CACHE: str(run.cache_fingerprint)[:8]}
            for one, run in zip(flat, runs, strict=True)
        ]
    fields = dict.fromkeys(field for one in flat for field in one)
    found = (Difference(field, [one.get(field) for one in flat]) for field in fields if not _ignored(field))
    return [difference for difference in found if any(v != difference.values[0] for v in difference.values)]


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run, from what differs: `jumprelu, k=32`. Folders' names where nothing or not enough does; the
    trainees of one run are called what they are called there.

    >>> def run(name, **config): return Run(name, config, [])
    >>> labels([run("a", k=8, lr=0.001), run("b", k=16, lr=0.001)])
    ['k=8', 'k=16']
    >>> labels([run("runs/a", k=8), run("runs/b", k=8)])
    ['a', 'b']
    """
    if len(runs) == 1:
        return [runs[0].name]
    if of_one_run(runs):
        return [str(run.trainee) for run in runs]
    told = sorted((d for d in differences(runs) if _in_label(d)), key=_rank)
    short = [_short(difference.field, [other.field for other in told]) for difference in told]
    # all that differ: a long label is still true, a cut one could name two runs alike
    parts = [
        [_part(name, difference, i) for name, difference in zip(short, told, strict=True)] for i in range(len(runs))
    ]
    made = [", ".join(part[:MOST_IN_A_LABEL]) for part in parts]
    if len(set(made)) == len(runs):
        return made
    names = _folder_names(runs)
    return [f"{name}: {label}" if label else name for name, label in zip(names, made, strict=True)]


def of_one_run(runs: Sequence[Run]) -> bool:
    """Whether they are trainees of one run."""
    return len({run.name.rpartition("/")[0] for run in runs}) == 1 and all(run.trainee for run in runs)


def title(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What a report of them is called."""
    if len(runs) == 1:
        return names[0]
    several = of_one_run(runs)
    return f"{runs[0].name.rpartition('/')[0]}: {len(runs)} dictionaries" if several else f"{len(runs)} runs"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"k": 1}} as {"model.k": 1}.

    >>> flatten({"model": {"k": 1, "sites": ["a"]}, "batch": 2})
    {'model.k': 1, 'model.sites': ['a'], 'batch': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def value_text(value: Any) -> str:
    """A configuration's value for people: numbers short, a `_target_` by its last name."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number_text(value)
    return str(value).rpartition(".")[2] if str(value).startswith("sparsepilot.") else str(value)


def _ignored(field: str) -> bool:
    return _within(field, NOT_A_DIFFERENCE) and not _within(field, BUT_THESE)


def _within(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def _in_label(difference: Difference) -> bool:
    """Fields that some runs lack come with another `_target_`, which says it already."""
    return None not in difference.values


def _rank(difference: Difference) -> int:
    """The kinds of model and controller come first, the kinds of their parts late; the cache is the last."""
    if not difference.field.endswith("_target_"):
        return 3 if difference.field == CACHE else 1
    return 0 if difference.field.count(".") == 1 else 2


def _part(short: str, difference: Difference, run: int) -> str:
    value = difference.values[run]
    if difference.field.endswith("_target_"):
        kind = str(value).rpartition(".")[2].lower()
        group = difference.field.removesuffix("._target_").rpartition(".")[2]
        return kind if group == "model" else f"{group}={kind}"
    return f"{short}={samples_text(value) if short == 'samples' else value_text(value)}"


def _short(field: str, all_fields: Sequence[str]) -> str:
    """The last part of a field's name, more of it where two would be alike."""
    parts = field.split(".")
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[-length:])
        if sum(other == name or other.endswith("." + name) for other in all_fields) == 1:
            return name
    return field


def _folder_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names without the folders that all have in common."""
    parts = [run.name.split("/") for run in runs]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return ["/".join(p[common:]) for p in parts]
