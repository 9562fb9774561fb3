"""The bytes that ranks give to collectives in a step are those of the formulas (parallel/traffic.py)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from test_many_ranks import BATCH, OPTIONS
from warm import Warm

from sparsepilot.parallel.traffic import (
    BF16,
    FP32,
    INT64,
    Message,
    Work,
    data_parallel,
    feature_parallel,
    fully_sharded,
    sent_bytes,
)

pytestmark = pytest.mark.slow  # processes

D, F, K, AUX_K = 16, 128, 1, 8
COUNTED = (*OPTIONS, "model.k=1", "model.revival.aux_k=8", "model.dense_above=1", f"samples={BATCH * 30}")
ROW = Message("dead latents of a row of metrics", "all_gather", INT64, 2)


@pytest.fixture(scope="module")
def lab(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Warm, Path]:
    return warm, tmp_path_factory.mktemp("counted")


Bytes = Counter[tuple[str, int]]


def counted(lab: tuple[Warm, Path], name: str, world: int, *options: str) -> list[tuple[int, Bytes]]:
    """Of each step: dead latents before it, and bytes that rank 0 gave, by (collective, ranks)."""
    warm, folder = lab
    script = "tests/distributed/counted.py"
    arguments = [script, *COUNTED, f"data.path={folder}/cache", f"run_dir={folder}/{name}"]
    arguments += [*options, f"trainer.devices={world}"]
    for ended in warm.ranks(world, arguments, {"WATCHED": f"{folder}/{name}-{{rank}}.jsonl"}):
        assert ended.code == 0, ended.out
    lines = [(folder / f"{name}-{rank}.jsonl").read_text().splitlines() for rank in range(world)]
    steps = []
    for ranks in zip(*lines, strict=True):
        step, *others = map(json.loads, ranks)
        found = Bytes()
        for kind, num_bytes, num_ranks in step["messages"]:
            found[kind, num_ranks] += num_bytes
        steps.append((step["dead"] + others[0]["dead"], found))
    return steps


def by_kind(messages: list[Message]) -> Bytes:
    found = Bytes()
    for message in messages:
        found[message.kind, message.ranks] += message.times * message.num_bytes
    return found


def work(**changes: int) -> Work:
    return Work(BATCH, D, D, F, K)._replace(**changes)


@pytest.mark.parametrize(("name", "world", "shards"), [("two", 2, 2), ("grid", 4, 2)])
def test_feature_parallel(lab: tuple[Warm, Path], name: str, world: int, shards: int) -> None:
    steps = counted(lab, name, world, "trainer=feature_parallel_cpu", f"trainer.strategy.features={shards}")
    alive = [found for dead, found in steps if dead == 0]
    assert alive[0] == by_kind([*feature_parallel(work(), world // shards, shards), ROW])
    with_dead = [found for dead, found in steps if dead > AUX_K]  # of both shards: no fewer than AuxK wants
    assert with_dead[-1] == by_kind([*feature_parallel(work(aux_k=AUX_K), world // shards, shards), ROW])


@pytest.mark.parametrize(("gradients", "width"), [("float32", FP32), ("bfloat16", BF16)])
def test_data_parallel(lab: tuple[Warm, Path], gradients: str, width: int) -> None:
    options = ("trainer=ddp_gloo", f"trainer.strategy.gradients={gradients}")
    _, found = counted(lab, gradients, 2, *options)[-1]
    assert found == by_kind(data_parallel(work(), 2, width))


def test_fully_sharded(lab: tuple[Warm, Path]) -> None:
    _, found = counted(lab, "fsdp", 2, "trainer=fsdp_cpu")[-1]
    assert found == by_kind(fully_sharded(work(), 2))


def test_what_grows_with_the_dictionary() -> None:
    """One line of shards: nothing. The others: all of it."""
    small, large = (
        work(batch=4096, d_in=4096, d_out=4096, d_sae=2**16),
        work(batch=4096, d_in=4096, d_out=4096, d_sae=2**20),
    )
    assert sent_bytes(feature_parallel(small, 1, 8)) == sent_bytes(feature_parallel(large, 1, 8))
    for formula in (data_parallel, fully_sharded):
        assert sent_bytes(formula(large, 8)) == pytest.approx(16 * sent_bytes(formula(small, 8)), rel=0.01)
    assert sent_bytes(feature_parallel(large, 1, 8)) < sent_bytes(data_parallel(large, 8)) / 100
