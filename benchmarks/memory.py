"""Peak memory of a training step, with and without tiles over the latents.

    python benchmarks/memory.py --scratch /tmp/steps --d-sae 16384 65536 262144 --tile-latents 8192
    python benchmarks/memory.py --scratch /tmp/steps --d-sae 16384 --tile-latents none --json memory.jsonl

Each shape runs in a fresh process, on the path of a run (`stepping.py`), at each of the given `model.tile_latents`
(`none`: not set). All figures in MiB, of resident memory:

state     parameters, gradients and the optimizer's tensors, counted
process   what was resident before the first step, less parameters: Python, torch and what building left behind
step      the peak of the steps after the first, less `state` and `process`: what a step needs beside its state; the
          loader's window (at most `loader_window_mib` in the JSON) and batches read ahead are in it
peak      VmHWM of those steps, reset before them (ru_maxrss, which cannot be, is in the JSON)

One line of JSON per shape as it is measured, then the table; `--json` also writes the lines to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers.worker import machine, quartiles
from stepping import Run, Settings, build_step_cache, metrics_of

from sparsepilot.config.cli import user_errors
from sparsepilot.reporting.environment import environment

MIB = 2**20


def status_mib(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def reset_peak() -> bool:
    """Makes VmHWM start anew from what is resident now; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def mib(tensors: list[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / MIB


def measure(settings: Settings, steps: int) -> dict[str, Any]:
    """The figures of one shape, in this process."""
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        run = Run(settings, Path(folder) / "run")
        parameters = list(run.module.parameters())
        process_mib = status_mib("VmRSS") - mib([p.data for p in parameters])
        window_mib = run.data.train_dataloader().window_bytes / MIB
        seconds: list[float] = []
        found: dict[str, Any] = {}

        def between(step_s: float, row: dict[str, Any]) -> bool:
            if "peak_was_reset" not in found:  # the first step made gradients, optimizer state and workspaces
                found["peak_was_reset"] = reset_peak()
                return True
            seconds.append(step_s)
            found["metrics"] = metrics_of(row)
            return len(seconds) < steps

        run.fit(between)
        peak_mib = status_mib("VmHWM")
        optimizer = run.trainer.optimizers[0]
        moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        parts = {
            "parameters_mib": mib([p.data for p in parameters]),
            "gradients_mib": mib([p for p in parameters if p.requires_grad]),
            "optimizer_mib": mib(moments),
        }
        state_mib = sum(parts.values())
        return {
            "d_sae": settings.d_sae,
            "overrides": settings.overrides,
            **parts,
            "state_mib": state_mib,
            "process_mib": process_mib,
            "step_mib": peak_mib - state_mib - process_mib,
            "peak_mib": peak_mib,
            "ru_maxrss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "loader_window_mib": window_mib,
            "step_s": quartiles(seconds)[1],
            **found,
            "settings": settings.to_json(),
            "versions": environment(),
            "machine": machine(),
        }


def measure_afresh(settings: Settings, tile: str, steps: int) -> dict[str, Any]:
    """The same in a new process; what went wrong there is a result too."""
    spec = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
    if tile != "none":  # ++: also where the configuration of this model does not list the field
        spec["overrides"] = [*settings.overrides, f"++model.tile_latents={tile}"]
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(spec), "--steps", str(steps)]
    environ = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    done = subprocess.run([*command, "--scratch", settings.scratch], capture_output=True, text=True, env=environ)
    which = {"d_sae": settings.d_sae, "tile_latents": None if tile == "none" else int(tile)}
    if done.returncode:
        words = done.stderr.strip().splitlines()
        return {**which, "error": f"status {done.returncode}: {words[-1] if words else 'no output'}"}
    return {**which, **json.loads(done.stdout)}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| d_sae | tile_latents | state MiB | step MiB | process MiB | peak MiB | s |", "|---" * 7 + "|"]
    for r in results:
        head = f"| {r['d_sae']:,} | {r['tile_latents'] or 'none'} |"
        if "error" in r:
            lines.append(f"{head} {r['error']} | | | | |")
        else:
            figures = (f"{r[name]:,.0f}" for name in ("state_mib", "step_mib", "process_mib", "peak_mib"))
            lines.append(f"{head} {' | '.join(figures)} | {r['step_s']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    d = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="further Hydra overrides")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the cache, which stays, and the runs")
    parser.add_argument("--model", default=d.model)
    parser.add_argument("--d-in", type=int, default=d.d_in)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[16384, 65536, 262144])
    parser.add_argument("--tile-latents", nargs="+", default=["none", "8192"], metavar="N", help="none: not set")
    parser.add_argument("--k", type=int, default=d.k)
    parser.add_argument("--l0", type=float, default=None, help="calibrate relu and jumprelu to about this L0")
    parser.add_argument("--batch", type=int, default=d.batch)
    parser.add_argument("--precision", default=d.precision)
    parser.add_argument("--steps", type=int, default=3, help="steps after the first")
    parser.add_argument("--threads", type=int, default=d.threads)
    parser.add_argument("--rows", type=int, default=8192, help="rows of the cache: few, the loader holds them all")
    parser.add_argument("--json", type=Path, default=None, help="write the lines here, too")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.one:
        with user_errors():
            print(json.dumps(measure(Settings.from_json(args.one), args.steps)))
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    names = Settings.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and name != "d_sae"}
    results = []
    for d_sae in args.d_sae:
        settings = Settings(**{**given, "d_sae": d_sae, "scratch": str(args.scratch.resolve())})
        build_step_cache(settings)
        for tile in args.tile_latents:
            results.append(measure_afresh(settings, tile, args.steps))
            print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
