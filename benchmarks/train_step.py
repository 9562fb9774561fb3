"""How long this project's training step takes, what Lightning adds to it, and how far it is from one matrix product.

    python benchmarks/train_step.py --scratch /tmp/steps --model topk --d-in 576 --d-sae 16384 --k 32 --batch 4096
    python benchmarks/train_step.py --scratch /tmp/steps --model jumprelu --l0 32 --precision bf16-mixed --json
    python benchmarks/train_step.py --scratch /tmp/steps --d-sae 4096 model.revival.coefficient=0 optimizer.lr=1e-3

Trailing words are Hydra overrides, after all others. Four things take turns, so that drift hits them alike:

full        one turn of Lightning's loop as in a run, data from a cache through the loader (`stepping.py`)
bare        the same step of a second module called directly on batches in memory: forward, backward, the module's
            `on_before_optimizer_step` (sums, projection, clipping), optimizer, `advance`; no Lightning, loader or rows
product     the encoder product alone, [batch, d_in] x [d_in, d_sae] into memory that is there, fp32: the ceiling
product16   the same with bf16 inputs and output

Ratios are medians of each round's own ratio. The loader reads its next batch when one is taken, so its work falls into
the full step although the others run between. `--l0` moves the thresholds of a relu or jumprelu model before the first
step; `l0` in the result is the mean over the timed steps. `--json` prints one line, and nothing else on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peers.activations import activations
from peers.worker import machine, quartiles
from stepping import Run, Settings, metrics_of

from sparsepilot.config.cli import user_errors
from sparsepilot.reporting.environment import environment
from sparsepilot.types import Batch

BARE_BATCHES = 4


class BareStep:
    """A module's step without Lightning, on a few batches that are in memory already."""

    def __init__(self, run: Run) -> None:
        s = run.settings
        self._module = run.another_module()
        self._optimizer = self._module.configure_optimizers()
        self._precision = run.trainer.precision_plugin
        x_BD = activations(min(s.rows, BARE_BATCHES * s.batch), s.d_in, s.dtype, s.seed)
        self._batches = [Batch(part, 0) for part in x_BD.split(s.batch) if len(part) == s.batch]
        for group in self._optimizer.param_groups:
            group["lr"] = run.cfg.optimizer.lr

    def __call__(self) -> None:
        module, optimizer = self._module, self._optimizer
        number = module.samples // module.batch
        with self._precision.forward_context():
            loss = module.training_step(self._batches[number % len(self._batches)], number)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        module.samples += module.batch
        for _, trainee in module.each():
            trainee.advance(module.samples)
        module._micro_batches.clear()


def encoder_product(settings: Settings, dtype: torch.dtype) -> Callable[[], object]:
    """The product that any encoder has to do, and nothing else."""
    s = settings
    x_BD = torch.randn(s.batch, s.d_in, dtype=dtype)
    W_FD = torch.randn(s.d_sae, s.d_in, dtype=dtype)
    out_BF = torch.zeros(s.batch, s.d_sae, dtype=dtype)
    return lambda: torch.mm(x_BD, W_FD.T, out=out_BF)


def measure(settings: Settings, steps: int, warmup: int, full_only: bool) -> dict[str, Any]:
    """Takes the turns; every time of every timed round, and loss and L0 of the full path."""
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        run = Run(settings, Path(folder) / "run")
        others: dict[str, Callable[[], object]] = {}
        if not full_only:
            others["bare"] = BareStep(run)
            others["product"] = encoder_product(settings, torch.float32)
            others["product16"] = encoder_product(settings, torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in ("full", *others)}
        metrics: list[dict[str, float]] = []
        rounds = 0

        def between(seconds: float, row: dict[str, Any]) -> bool:
            nonlocal rounds
            taken = {"full": seconds}
            for name, act in others.items():
                began_s = time.perf_counter()
                act()
                taken[name] = time.perf_counter() - began_s
            metrics.append(metrics_of(row))
            rounds += 1
            if rounds > warmup:
                for name, value in taken.items():
                    times[name].append(value)
            return rounds < warmup + steps

        run.fit(between)
        return {"times": times, "metrics": metrics, "model": OmegaConf.to_container(run.cfg.model, resolve=True)}


def report(settings: Settings, measured: dict[str, Any], warmup: int) -> dict[str, Any]:
    """One JSON object of medians, quartiles and paired ratios."""
    times, metrics = measured["times"], measured["metrics"]
    result: dict[str, Any] = {}
    for name, values in times.items():
        q1, median, q3 = quartiles([1e3 * value for value in values])
        result[name] = {
            "samples_per_s": settings.batch / median * 1e3,
            "step_ms": {"q1": q1, "median": median, "q3": q3},
        }
    full = result.pop("full")

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    if "bare" in times:
        result["lightning_logging_loading_share"] = 1 - ratio("bare", "full")
        result["full_of_product"] = ratio("product", "full")
        result["bare_of_product"] = ratio("product", "bare")
    timed = metrics[warmup:]
    return {
        **full,
        **result,
        "loss_first": metrics[0]["loss"],
        "loss_last": metrics[-1]["loss"],
        "l0": statistics.fmean(row["l0"] for row in timed),
        "l0_range": [min(row["l0"] for row in timed), max(row["l0"] for row in timed)],
        "steps": len(timed),
        "warmup": warmup,
        "settings": settings.to_json(),
        "model": measured["model"],
        "versions": environment(),
        "machine": machine(),
        "seconds": times,
    }


def print_result(result: dict[str, Any]) -> None:
    """The figures for people."""
    rows = {"full": result, **{name: result[name] for name in ("bare", "product", "product16") if name in result}}
    print(f"{'':10} {'samples/s':>12} {'ms':>9} {'q1':>9} {'q3':>9}")
    for name, row in rows.items():
        ms = row["step_ms"]
        print(f"{name:10} {row['samples_per_s']:12,.0f} {ms['median']:9.2f} {ms['q1']:9.2f} {ms['q3']:9.2f}")
    if "bare" in result:
        share = result["lightning_logging_loading_share"]
        print(f"Lightning, logging and data loading together: {share:.1%} of the step")
        print(
            f"of what the fp32 encoder product alone allows: {result['full_of_product']:.1%} in a run, "
            f"{result['bare_of_product']:.1%} bare"
        )
    low, high = result["l0_range"]
    print(
        f"loss {result['loss_first']:.4g} -> {result['loss_last']:.4g}, L0 {result['l0']:.4g} ({low:.4g} to {high:.4g})"
    )


def main() -> None:
    d = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="further Hydra overrides")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the cache, which stays, and the run")
    parser.add_argument("--model", default=d.model, help="a name in conf/model")
    parser.add_argument("--d-in", type=int, default=d.d_in)
    parser.add_argument("--d-sae", type=int, default=d.d_sae)
    parser.add_argument("--k", type=int, default=d.k, help="where the model has a k")
    parser.add_argument("--l0", type=float, default=None, help="calibrate relu and jumprelu to about this L0")
    parser.add_argument("--batch", type=int, default=d.batch)
    parser.add_argument("--precision", default=d.precision, help="trainer.precision: 32-true, bf16-mixed")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=d.threads)
    parser.add_argument("--seed", type=int, default=d.seed)
    parser.add_argument("--rows", type=int, default=d.rows, help="rows of the cache")
    parser.add_argument("--dtype", default=d.dtype, choices=["float32", "bfloat16"], help="of the cache")
    parser.add_argument("--full-only", action="store_true", help="the path of a run alone, without the other three")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, nothing else")
    args = parser.parse_intermixed_args()
    if args.steps < 1 or args.warmup < 0:
        parser.error("--steps: at least 1; --warmup: 0 or more")
    args.scratch.mkdir(parents=True, exist_ok=True)
    names = Settings.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    settings = Settings(**{**given, "scratch": str(args.scratch.resolve())})
    with user_errors():
        result = report(settings, measure(settings, args.steps, args.warmup, args.full_only), args.warmup)
    if args.json:
        print(json.dumps(result))
    else:
        print_result(result)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
