"""`hydra/launcher=slurm`: the members of a sweep as jobs of Slurm, each with an end of its own.

Hydra looks for launchers in this package only. This one submits as hydra-submitit-launcher does, and waits otherwise:
that one stops waiting at the first job that has left no result (killed, cancelled, out of memory), and asks Slurm's
accounting, which not every cluster has.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher

from sparsepilot.config.sweeping import led
from sparsepilot.errors import ConfigError
from sparsepilot.sweep_folder import Member, Place, SweepFolder

try:
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError:  # Hydra imports this module at every start, installed or not
    SlurmLauncher, IS_INSTALLED = Launcher, False
else:
    IS_INSTALLED = True

if TYPE_CHECKING:
    from submitit import Job

LOOK_S, ASK_S = 1.0, 20.0
"""How often results are looked for, and Slurm is asked which jobs it still has."""


class MembersOnSlurm(SlurmLauncher):  # type: ignore[misc]
    """One array of jobs, a task for each member; see conf/hydra/launcher/slurm.yaml for its options."""

    def __init__(self, **params: Any) -> None:
        if not IS_INSTALLED:
            raise ConfigError(
                "hydra/launcher = slurm: submitit is not installed; pip install -c constraints.txt -e '.[slurm]'"
            )
        super().__init__(**params)

    def setup(self, **given: Any) -> None:
        """What Hydra hands to a launcher. (Written out, or Hydra would not count this class without its base.)"""
        super().setup(**given)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits a job for each member and waits until all have ended, one way or another.

        Raises:
            ConfigError: when Slurm does not take them.
        """
        sweep = SweepFolder(str(self.config.hydra.sweep.dir))
        places = [Place(str(sweep.path), initial_job_idx + i) for i in range(len(job_overrides))]
        for place, overrides in zip(places, job_overrides, strict=True):
            sweep.write(Member(place.number, [str(word) for word in filter_overrides(overrides)], ""))
        led.extend(places)
        jobs = self._submit(job_overrides, initial_job_idx)
        print(f"sweep {sweep.path}: {len(jobs)} jobs, the first is {jobs[0].job_id}", flush=True)
        print(f"  they go on without this process; python scripts/report.py sweep_dir={sweep.path} says how they stand")
        waiting = dict(zip(places, jobs, strict=True))
        asked_s = time.monotonic()
        while waiting:
            time.sleep(LOOK_S)
            ended = {place for place, job in waiting.items() if has_result(job)}
            if time.monotonic() - asked_s > ASK_S:
                asked_s = time.monotonic()
                queued = in_queue([job.job_id for job in waiting.values()])
                ended |= {p for p, job in waiting.items() if queued is not None and job.job_id not in queued}
            for place in ended:
                self._note(sweep, place, waiting.pop(place))
        return [JobReturn(overrides=list(words), status=JobStatus.COMPLETED) for words in job_overrides]

    def _submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Job[Any]]:
        options = dict(self.params)
        folder, num_timeouts = options.pop("submitit_folder"), options.pop("max_num_timeout")
        common = BaseQueueConf.__dataclass_fields__.keys()
        try:
            executor = submitit.AutoExecutor(cluster="slurm", folder=folder, slurm_max_num_timeout=num_timeouts)
            executor.update_parameters(**{k if k in common else f"slurm_{k}": v for k, v in options.items()})
            # a job calls this object as hydra-submitit-launcher's with what stands here
            calls = [
                (
                    [*words],
                    "hydra.sweep.dir",
                    initial_job_idx + i,
                    f"member_{initial_job_idx + i}",
                    Singleton.get_state(),
                )
                for i, words in enumerate(job_overrides)
            ]
            return list(executor.map_array(self, *zip(*calls, strict=True)))
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"hydra/launcher = slurm: the members could not be submitted: {reason}") from error

    def _note(self, sweep: SweepFolder, place: Place, job: Job[Any]) -> None:
        """A member's own record says how it ended, but for one that was ended from outside."""
        try:
            if has_result(job):
                job.results()
        except Exception as error:  # whatever went wrong before or after the member itself
            reason = next((line for line in reversed(str(error).splitlines()) if "Error" in line), str(error))
            sweep.mark(place.number, "failed", reason.strip())
        member = sweep.member(place.number)
        if member.status not in ("done", "failed", "stopped"):
            sweep.mark(place.number, "failed", f"its job {job.job_id} was ended from outside; {job.paths.stdout}")
        print(sweep.member(place.number).told() + f": {sweep.member(place.number).status}", flush=True)


def has_result(job: Job[Any]) -> bool:
    """Whether all tasks of a job have left what they leave at their end."""
    return all(Path(job.task(i).paths.result_pickle).exists() for i in range(job.num_tasks))


def in_queue(ids: Sequence[str]) -> set[str] | None:
    """Those of some jobs that wait, run or are about to end; None where Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join({i.split('_')[0] for i in ids})}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return None
    # "12_3", and "12_[5]" of a task that waits
    return {line.strip().replace("[", "").replace("]", "") for line in done.stdout.splitlines()}
