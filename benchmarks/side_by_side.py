"""Training steps of this project and of other tools in turn, on the same activations.

    python benchmarks/side_by_side.py --scratch /tmp/steps --arch topk --peers-python .venv-peers/bin/python \\
        --rounds 7 --json topk.json
    python benchmarks/side_by_side.py --scratch /tmp/steps --arch jumprelu --l0 32 --peers-python ... --hugetlb
    python benchmarks/side_by_side.py --scratch /tmp/steps --arch topk --ours 'no AuxK=model/revival=none'

How the peers' environment is made, and what a candidate's name means, stands in `benchmarks/peers/steps.py`. Every
candidate is a process of its own that takes one step when it is told so; only one works at a time, in rounds: first
candidate, second, ..., first again. Between two steps there is a pause, in which OpenMP's threads stop spinning;
`idle_cpu_share` in the JSON says how many processors the waiting ones had while another worked, `working_cpus` how many
that one had: well below `--threads`, other programs were in the way.

Ours is the path of a run: Lightning's loop, the loader, the callbacks (`stepping.py`), from the word `go` to the end
of the step's last callback. Its loader reads ahead while others work, as it does while a step computes. The peers'
rows lie in memory, in fp32, and their step is their trainer's, without data loading and logging. Both see the rows of
`peers/activations.py`, rounded to the dtype of our cache; each worker's checksum of the first batch is compared. For
relu and jumprelu our thresholds are calibrated to `--l0` (default: `--k`): the cost of our step depends on L0, which is
in the table; the peers' steps are dense and cost the same at any.

Ratios are medians over rounds of (their time / our time) within a round: above 1, ours is faster. A candidate that
fails is a row with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from peers.common import write_json
from peers.worker import quartiles
from stepping import Settings, build_step_cache

HERE = Path(__file__).resolve().parent
OURS = ["sparsepilot=", "sparsepilot, bf16-mixed=trainer.precision=bf16-mixed"]
DENSE_PEERS = ["sae-lens", "sae-lens:autocast", "dictionary-learning", "dictionary-learning:bf16mm"]
PEERS = {
    "topk": [
        "sae-lens",
        "sae-lens:sparse",
        "sae-lens:autocast",
        "sae-lens:sparse+bf16mm",
        "dictionary-learning",
        "dictionary-learning:bf16mm",
        "sparsify",
        "sparsify:bf16mm",
    ],
    **dict.fromkeys(("batchtopk", "jumprelu", "relu", "gated", "matryoshka"), DENSE_PEERS),
}
CALIBRATED = ("relu", "jumprelu")


class Worker:
    """The parent's end of a candidate's process."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.losses: list[float | None] = []
        self.l0: list[float] = []
        self.error: str | None = None
        self._log: IO[str] = log.open("w", encoding="utf-8")
        self._log_path = log
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.hello = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            self.error = answer["error"].strip().splitlines()[0][:200]
            self.close()
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        lines = self._log_path.read_text(encoding="utf-8").strip().splitlines()
        return f"ended with status {self._process.returncode}: {lines[-1] if lines else 'no output'}"

    def step(self, timed: bool) -> float | None:
        """One step; its seconds, or None where it failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.error = self._last_words()
            return None
        answer = self._answer()
        if self.error is not None:
            return None
        self.losses.append(answer["loss"])
        if timed:
            self.seconds.append(answer["s"])
            if "l0" in answer:
                self.l0.append(answer["l0"])
        return float(answer["s"])

    def cpu_s(self) -> float:
        """Processor time of all its threads so far."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the input, at which the process leaves."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def start(args: argparse.Namespace, settings: Settings) -> list[Worker]:
    """One process per candidate, ours first, built one after the other."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    if args.hugetlb:
        others = [word for word in os.environ.get("GLIBC_TUNABLES", "").split(":") if word]
        environment["GLIBC_TUNABLES"] = ":".join([*others, "glibc.malloc.hugetlb=1"])
    commands: dict[str, list[str]] = {}
    for text in args.ours or OURS:
        name, _, words = text.partition("=")
        ours = {**asdict(settings), "overrides": [*settings.overrides, *words.split()]}
        commands[name] = [sys.executable, str(HERE / "stepping.py"), json.dumps(ours)]
    if args.peers_python is not None:
        for candidate in PEERS[args.arch] if args.peers is None else args.peers:
            spec = {"candidate": candidate, "arch": args.arch}
            spec |= {
                name: getattr(settings, name) for name in ("d_in", "d_sae", "k", "batch", "threads", "seed", "dtype")
            }
            commands[candidate] = [str(args.peers_python), str(HERE / "peers" / "steps.py"), json.dumps(spec)]
    workers: list[Worker] = []
    try:
        for name, command in commands.items():
            say(f"building {name}")
            log = Path(settings.scratch) / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.txt"
            workers.append(Worker(name, command, environment, log))
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    return workers


def take_turns(workers: list[Worker], rounds: int, warmup: int, pause_s: float) -> dict[str, Any]:
    """Steps all in rounds; what the waiting ones used meanwhile, and the load."""
    idle_cpu_s = own_cpu_s = working_s = 0.0
    loads = []
    for number in range(-warmup, rounds):
        for worker in workers:
            if worker.error is not None:
                continue
            time.sleep(pause_s)
            waiting = [other for other in workers if other is not worker and other.error is None]
            own_s, others_s = worker.cpu_s(), sum(other.cpu_s() for other in waiting)
            began_s = time.perf_counter()
            worker.step(timed=number >= 0)
            if number >= 0 and worker.error is None:
                working_s += time.perf_counter() - began_s
                own_cpu_s += worker.cpu_s() - own_s
                idle_cpu_s += sum(other.cpu_s() for other in waiting) - others_s
        loads.append(os.getloadavg()[0])
        say(f"{'round' if number >= 0 else 'warm-up'} {number + 1 if number >= 0 else number + warmup + 1}")
    working_s = max(working_s, 1e-9)
    return {"idle_cpu_share": idle_cpu_s / working_s, "working_cpus": own_cpu_s / working_s, "loadavg_1min": loads}


def paired_ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over rounds of their time over ours."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=False))


def candidate_result(worker: Worker, ours: list[Worker], batch: int) -> dict[str, Any]:
    """All that is known of one candidate."""
    about = {name: worker.hello.get(name) for name in ("versions", "machine")}
    result: dict[str, Any] = {"candidate": worker.name, **about}
    if worker.error is not None or not worker.seconds:
        return {**result, "error": worker.error or "no timed step"}
    q1, median, q3 = quartiles(worker.seconds)
    losses = [loss for loss in worker.losses if loss is not None and math.isfinite(loss)]
    return {
        **result,
        "samples_per_s": batch / median,
        "samples_per_s_q1": batch / q3,
        "samples_per_s_q3": batch / q1,
        "ratio": {own.name: paired_ratio(worker.seconds, own.seconds) for own in ours if own.error is None},
        "l0": statistics.fmean(worker.l0) if worker.l0 else None,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "checksum": worker.hello["checksum"],
        "seconds": worker.seconds,
    }


def table(results: list[dict[str, Any]], ours: list[str]) -> str:
    """Markdown; one ratio column for each of ours."""
    lines = [
        "| candidate | samples/s | q1 - q3 | " + " | ".join(f"{name} / it" for name in ours) + " | L0 |",
        "|---" * (4 + len(ours)) + "|",
    ]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['candidate']} | {r['error'].replace('|', '/')} |" + " |" * (2 + len(ours)))
            continue
        ratios = " | ".join(f"{r['ratio'][name]:.2f}" if name in r["ratio"] else "" for name in ours)
        l0 = "" if r["l0"] is None else f"{r['l0']:.1f}"
        span = f"{r['samples_per_s_q1']:,.0f} - {r['samples_per_s_q3']:,.0f}"
        lines.append(f"| {r['candidate']} | {r['samples_per_s']:,.0f} | {span} | {ratios} | {l0} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    d = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides for all of ours")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the cache and the workers' output")
    parser.add_argument("--arch", default="topk", choices=list(PEERS))
    parser.add_argument("--peers-python", type=Path, default=None, help="python with the peers; none: ours only")
    parser.add_argument("--peers", nargs="+", default=None, metavar="CANDIDATE", help="instead of all for the arch")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=OVERRIDES", help="instead of fp32 and bf16"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two steps")
    parser.add_argument("--d-in", type=int, default=d.d_in)
    parser.add_argument("--d-sae", type=int, default=d.d_sae)
    parser.add_argument("--k", type=int, default=d.k)
    parser.add_argument("--l0", type=float, default=None, help="of ours, for relu and jumprelu; default: k")
    parser.add_argument("--batch", type=int, default=d.batch)
    parser.add_argument("--threads", type=int, default=d.threads)
    parser.add_argument("--seed", type=int, default=d.seed)
    parser.add_argument("--rows", type=int, default=d.rows, help="rows of the cache")
    parser.add_argument("--dtype", default=d.dtype, choices=["float32", "bfloat16"], help="of the cache")
    parser.add_argument("--hugetlb", action="store_true", help="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for all workers")
    parser.add_argument("--json", type=Path, default=None, help="write everything here")
    args = parser.parse_intermixed_args()
    if args.rounds < 1 or args.warmup < 1:
        parser.error("--rounds and --warmup: at least 1")
    args.scratch.mkdir(parents=True, exist_ok=True)
    names = Settings.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    l0 = (args.l0 or float(args.k)) if args.arch in CALIBRATED else None
    settings = Settings(**{**given, "model": args.arch, "l0": l0, "scratch": str(args.scratch.resolve())})
    build_step_cache(settings)

    workers = start(args, settings)
    try:
        turns = take_turns(workers, args.rounds, args.warmup, args.pause)
    finally:
        for worker in workers:
            worker.close()
    ours = workers[: len(args.ours or OURS)]
    results = [candidate_result(worker, ours, args.batch) for worker in workers]
    sums = {r["checksum"] for r in results if "checksum" in r}
    if len(sums) > 1:
        raise SystemExit(f"the candidates did not see the same rows: checksums {sorted(sums)}")
    if args.json:
        about = {"settings": settings.to_json(), "rounds": args.rounds, "warmup": args.warmup, "hugetlb": args.hugetlb}
        write_json(args.json, {**about, **turns, "results": results})
    print(table(results, [own.name for own in ours if own.error is None]))
    say(
        f"the candidate at work had {turns['working_cpus']:.2f} processors on average, "
        f"those that waited {turns['idle_cpu_share']:.3f}"
    )


if __name__ == "__main__":
    main()
