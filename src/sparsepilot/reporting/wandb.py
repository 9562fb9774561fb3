"""Weights & Biases, fed from a run folder.

`metrics.jsonl` is the truth and W&B a copy of it. Online, rows are sent once a checkpoint covers them, so a killed run
never shows a row that its resumed self will write again. Offline there is nobody to watch, so the copy is made in one
go when training ends (or by scripts/sync_wandb.py after a kill): one folder, each step once, however often the run
was broken.
"""

from __future__ import annotations

import json
import netrc
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal

from sparsepilot.errors import ConfigError
from sparsepilot.metrics.firing import LOG10_EDGES
from sparsepilot.rows import read_rows, rows_up_to
from sparsepilot.run_folder import RunFolder
from sparsepilot.saved import read_config, read_object

MODES = ("auto", "online", "offline", "disabled")


def resolve_mode(mode: str) -> str:
    """`online`, `offline` or `disabled`; `auto` is online where the user is logged in. WANDB_MODE wins over `auto`.

    Raises ConfigError for a mode that does not exist.
    """
    if mode not in MODES:
        raise ConfigError(f"logger.wandb.mode = {mode}: should be one of {', '.join(MODES)}")
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in MODES[1:]:
        return os.environ["WANDB_MODE"]
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def begin(folder: RunFolder, settings: Mapping[str, Any], mode: Literal["online", "offline"], into: str) -> Any:
    """Opens the W&B run of a run folder, with the folder's own id; `into` is where W&B keeps its files."""
    import wandb

    identity, config = read_object(folder.identity), read_config(folder)
    made_with = {key: identity[key] for key in ("made", "cache_fingerprint", "environment")}
    run = wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        tags=settings["tags"],
        id=identity["id"],
        name=f"{folder.path.parent.name}/{folder.path.name}",
        dir=into,
        mode=mode,
        resume="allow" if mode == "online" else None,
        config={**config, **made_with},
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, x_save_requirements=False),
    )
    run.define_metric("samples")
    run.define_metric("*", step_metric="samples")
    return run


def by_step(rows: Iterable[Mapping[str, Any]], after_step: int) -> Iterator[dict[str, Any]]:
    """One row per step past `after_step`: a step's training and validation rows together.

    >>> list(by_step([{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 2, "b": 3}], after_step=1))
    [{'step': 2, 'a': 2, 'b': 3}]
    """
    for step, group in groupby(rows, key=lambda row: row["step"]):
        if step > after_step:
            yield {key: value for row in group for key, value in row.items()}


def send(run: Any, rows: Iterable[Mapping[str, Any]], after_step: int) -> int:
    """Logs every step past `after_step` once; returns the last one logged."""
    import wandb

    for row in by_step(rows, after_step):
        values = dict(row)
        for key, value in row.items():
            if key.endswith("firing_density_histogram"):
                values[key] = wandb.Histogram(np_histogram=(value, list(LOG10_EDGES)))
        run.log(values, step=row["step"])
        after_step = row["step"]
    return after_step


def send_pictures(run: Any, folder: RunFolder) -> None:
    """Logs the pictures of the run's report with its last step; nothing where it has none, or has those of an earlier
    end of a run that has gone on since: pictures are of all rows, so they are the younger files."""
    import wandb

    rows = list(read_rows(folder.metrics))
    written = folder.metrics.stat().st_mtime_ns if rows else 0
    paths = sorted(path for path in folder.report.glob("*.png") if path.stat().st_mtime_ns >= written)
    if paths and rows:
        images = {f"report/{path.stem}": wandb.Image(str(path)) for path in paths}
        # a run gone on with may be past the last row's step already: W&B drops what goes back
        run.log({**images, "samples": rows[-1]["samples"]}, step=max(rows[-1]["step"], run.step))


def send_features(run: Any, folder: RunFolder) -> None:
    """Logs the latents that scripts/features.py drew, as a table; nothing where it was not run."""
    import wandb

    rows = list(read_rows(folder.metrics))
    samples = {"features/sample": folder.features / "sample.json"}
    samples |= {f"{p.parts[-3]}/features/sample": p for p in sorted(folder.path.glob("*/features/sample.json"))}
    for key, path in samples.items():
        if path.is_file() and rows:
            latents = json.loads(path.read_text(encoding="utf-8"))
            columns = list(latents[0]) if latents else []
            table = wandb.Table(columns=columns, data=[[latent[name] for name in columns] for latent in latents])
            run.log({key: table, "samples": rows[-1]["samples"]}, step=max(rows[-1]["step"], run.step))


class LiveRun:
    """The online run: rows are sent as checkpoints cover them, none twice over any number of resumes."""

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._run = begin(folder, settings, "online", str(folder.path))
        # what the server has is what counts: this process knows nothing of what an earlier one got through
        self._sent_step = max(int(self._run.summary.get("step") or 0), int(self._run.step) - 1)

    def after_checkpoint(self, samples: int) -> None:
        """Sends what the checkpoint at `samples` covers."""
        self._sent_step = send(self._run, rows_up_to(self._folder.metrics, samples), self._sent_step)

    def add_pictures(self) -> None:
        """Sends the pictures of the run's report, and what is known of its features."""
        send_pictures(self._run, self._folder)
        send_features(self._run, self._folder)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def write_offline_run(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Makes `<run>/wandb` anew from rows, pictures and features: one offline run, ready for `wandb sync`."""
    aside = folder.path / "wandb.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    run = begin(folder, settings, "offline", str(aside))
    send(run, read_rows(folder.metrics), after_step=0)
    send_pictures(run, folder)
    send_features(run, folder)
    run.finish()
    shutil.rmtree(folder.path / "wandb", ignore_errors=True)  # a copy of the rows, made again just now
    os.replace(aside / "wandb", folder.path / "wandb")
    shutil.rmtree(aside)


class WandbCopy:
    """W&B as a training run sees it: whatever goes wrong there is said and never stops or spoils the run.

    Args:
        folder: the run.
        settings: conf/logger/wandb.yaml's node, or None where W&B is not wanted.
        say: prints a line for the user.
    """

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any] | None, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._settings = settings or {}
        self._say = say
        self._mode = resolve_mode(self._settings["mode"]) if settings else "disabled"
        self._live: LiveRun | None = None

    def begin(self) -> None:
        """Opens the online run; where that fails, an offline one is made at the end."""
        if self._mode == "online":
            try:
                self._live = LiveRun(self._folder, self._settings)
            except Exception as error:  # somebody else's server, network or account: not worth a training run
                self._warn(error)
                self._mode = "offline"

    def after_checkpoint(self, samples: int) -> None:
        """Sends what the checkpoint at `samples` covers."""
        if self._live is not None:
            try:
                self._live.after_checkpoint(samples)
            except Exception as error:
                self._warn(error)

    def add_pictures(self) -> None:
        """Sends the report's pictures to the online run; the offline one takes them when it is made."""
        if self._live is not None:
            try:
                self._live.add_pictures()
            except Exception as error:
                self._warn(error)

    def close(self) -> None:
        """Waits until everything is sent."""
        if self._live is not None:
            try:
                self._live.close()
            except Exception as error:  # it would take the place of whatever ends the run just now
                self._warn(error)

    def finish(self) -> None:
        """Makes the offline run, where that is the mode."""
        if self._mode == "offline":
            try:
                write_offline_run(self._folder, self._settings)
            except Exception as error:
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        reason = " ".join(str(error).split())
        self._say(
            f"warning: W&B: {reason}; metrics.jsonl has every row, and `python scripts/sync_wandb.py "
            f"run_dir={self._folder.path}` copies them"
        )
