"""Is `constrained` as sparse as its quality allows? Three seeds beside a frontier of separate constant runs.

    python benchmarks/control_constrained.py --scratch grid       # resumable
    python benchmarks/control_constrained.py --scratch grid --table
    python benchmarks/control_constrained.py --scratch grid --model relu --batch 256 --samples 2457600 --target 0.13
    python benchmarks/control_constrained.py --scratch grid --quality ce_gap --samples 2457600 --target 0.02

Demo cache; the quality is the FVU of training, or the cross-entropy of the language model on held-out text as a share
of the way from the clean to the mean-ablated model, measured 200 times a run. Asked, of the last third of the run: the
mean quality (FVU, or cross-entropy in nats) within 1% below the target or within 2 standard errors of it (of a mean of
measurements, from the spread of means over 1% of the budget), the strength off its clamps; at the end an L0 at
most 10% above that of the frontier of constant coefficients at the same quality on held-out rows: FVU, or how much the
cross-entropy is above the clean model's. Both qualities have the same constants, so a target can be picked from what
they came to.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean, stdev
from typing import Any

from control.cells import Where, interpolated, last_of, parts_of, rows_of, there, words_of

MEASURED = {"fvu": "train/fvu", "ce_gap": "val/ce"}
OFTEN, OFTEN_TOKENS, VALIDATIONS = 200, 1000, 10
"""Measurements of cross-entropy in a run, on so many tokens, and validations, each on 10,000."""


def held_out(quality: str, row: dict[str, Any]) -> float:
    """What a validation says of the quality, as the frontier has it."""
    return float(row["val/fvu"] if quality == "fvu" else row["val/ce"] - row["val/ce_clean"])


def target_of(quality: str, target: float, row: dict[str, Any]) -> float:
    """The target in units of what is measured."""
    if quality == "fvu":
        return target
    clean, ablated = row["val/ce_clean"], row["val/ce_mean"]
    return float(clean + target * (ablated - clean))


def measured(quality: str, samples: int) -> list[str]:
    """Overrides that have a run measure the quality that it is held to."""
    if quality == "fvu":
        return []
    often = [f"cross_entropy.every_samples={samples // OFTEN}", f"cross_entropy.often_tokens={OFTEN_TOKENS}"]
    return ["cross_entropy=spliced", f"callbacks.validate_every_samples={samples // VALIDATIONS}", *often]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Where.arguments(parser)
    parser.add_argument("--model", default="jumprelu")
    parser.add_argument("--quality", choices=list(MEASURED), default="fvu")
    parser.add_argument("--target", type=float, default=0.15, help="FVU of training, or a share of the gap")
    parser.add_argument("--coefficients", nargs="*", type=float, default=[0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--samples", type=int, default=1_228_800, help="of each run")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    where, quality = Where.of(args), args.quality
    sizes = [f"samples={args.samples}", f"batch={args.batch}"]
    base, points = [*words_of(where, "demo", args.model), *sizes], []
    run = f"demo-{args.model}-{args.samples}-batch{args.batch}"
    at_the_end = ["cross_entropy=spliced", f"callbacks.validate_every_samples={args.samples}"]
    print(
        "| run | L0 | FVU, held out | CE over the clean one | its share of the gap |", "|---|---|---|---|---|", sep="\n"
    )
    for coefficient in args.coefficients:
        name = f"{run}-coefficient{coefficient:g}".replace(".", "_")
        if there(where, name, [*base, *at_the_end, f"model.coefficient={coefficient}"]):
            last = last_of(where, name)
            points.append((held_out(quality, last), last["val/l0"]))
            above, gap = held_out("ce_gap", last), last["val/ce_mean"] - last["val/ce_clean"]
            print(
                f"| constant {coefficient:g} | {last['val/l0']:.2f} | {last['val/fvu']:.5f} | {above:.4f} "
                f"| {above / gap:.4f} |",
                flush=True,
            )
    print(
        "", "| seed | quality, last third | SE | target | L0 | held out | frontier's L0 there | more | at a clamp |",
        "|---|---|---|---|---|---|---|---|---|", sep="\n",
    )  # fmt: skip
    for seed in args.seeds:
        name = f"{run}-{quality}{args.target:g}-seed{seed}".replace(".", "_")
        words = [*base, *measured(quality, args.samples), "controller=constrained", f"controller.quality={quality}"]
        if not there(where, name, [*words, f"controller.target={args.target:g}", f"seed={seed}"]):
            continue
        rows = rows_of(where, name)
        late = [row for row in rows if row["samples"] > 2 / 3 * rows[-1]["samples"]]
        parts = parts_of(late, MEASURED[quality], args.samples / 100)
        means = [mean(values) for values in parts.values()]
        value = mean(value for values in parts.values() for value in values)
        error = stdev(means) / math.sqrt(len(means))
        last = last_of(where, name)
        target, found = target_of(quality, args.target, last), held_out(quality, last)
        frontier = interpolated(points, found)
        print(
            f"| {seed} | {value:.5f} ({value / target - 1:+.2%}) | {error:.5f} | {target:.5f} | {last['val/l0']:.2f} "
            f"| {found:.5f} | {frontier:.2f} | {last['val/l0'] / frontier - 1:+.1%} "
            f"| {sum(row.get('controller/at_limit', 0) for row in late):.0f} rows |",
            flush=True,
        )


if __name__ == "__main__":
    main()
