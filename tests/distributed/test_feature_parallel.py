"""Latents dealt out over ranks, alone and beside data parallelism: the same rows, losses, control and dead latents as
one rank, and checkpoints from which every trainer goes on.

Every rank is a process of its own, gloo between them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_many_ranks import BATCH, STEPS, Lab, Run
from warm import Warm

pytestmark = pytest.mark.slow  # dozens of processes

CASES: dict[str, tuple[str, ...]] = {
    "topk": ("model=topk", "model.k=2", "model.multi_topk=0.125"),
    "batchtopk": ("model=batchtopk", "model.k=1"),
    "jumprelu": (
        *("model=jumprelu", "model.threshold=2.0", "model/revival=aux_k"),
        *("controller=l0_target", "controller.target_l0=0.2"),
    ),
    "relu": (
        *(
            "model=relu",
            "model.rescale=true",
            "model.coefficient=60",
            f"samples={30 * BATCH}",
            "model/revival=resample",
        ),
        *("model.revival.every_samples=1280", "model.revival.until=1", "accumulate=2"),
    ),
}
"""What else there is (tests/unit/parallel) needs no processes."""
GRIDS = {"2": (2, 2), "4": (4, 4), "2x2": (4, 2)}
"""ranks, and how many of them share the latents"""
GRIDS_OF = {"topk": GRIDS, "batchtopk": ("4",), "jumprelu": ("2x2",), "relu": ("2x2",)}


@pytest.fixture(scope="module")
def lab(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), warm)


def assert_same_training(one: Run, many: Run) -> None:
    """Counts equal, measurements and controls within 1e-5."""
    assert len(one.rows) == len(many.rows)
    for a, b in zip(one.rows, many.rows, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            close = pytest.approx(value, rel=1e-5, abs=1e-9) if isinstance(value, float) else value
            assert b[key] == close, (key, a["step"])


def assert_one_dictionary(run: Run, num_shards: int) -> None:
    """What all ranks share has one value; what a shard has is the same in each line."""
    for ranks in zip(*run.ranks, strict=True):
        for number, rank in enumerate(ranks):
            first_of_column, first = ranks[number % num_shards], ranks[0]
            assert rank["digests"] == first_of_column["digests"]
            differing = {name for name in first["digests"] if rank["digests"][name] != first["digests"][name]}
            alike = ("b_dec", "coherence", ".threshold", "mean_sq_residual", "dead.samples", "products_2")
            assert not {name for name in differing if name.endswith(alike)}
            assert rank["strength"] == first["strength"]
            assert rank["without_gradient"] == []


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_latents_train_as_one(lab: Lab, tmp_path: Path, case: str) -> None:
    one = lab.run(tmp_path / "one", 1, *CASES[case])
    assert one.ranks[0][-1]["step"] == (30 if case == "relu" else STEPS)
    assert any(row.get("train/dead_latents", 0) > 0 for row in one.rows)
    for name in GRIDS_OF[case]:
        world, num_shards = GRIDS[name]
        features = f"trainer.strategy.features={num_shards}"
        many = lab.run(tmp_path / name, world, *CASES[case], features, trainer="feature_parallel_cpu")
        assert_same_training(one, many)
        assert_one_dictionary(many, num_shards)
        for alone, *ranks in zip(one.ranks[0], *many.ranks, strict=True):
            lines = [ranks[first : first + num_shards] for first in range(0, world, num_shards)]
            assert all(rank["rows"] == line[0]["rows"] for line in lines for rank in line)
            assert sorted(row for line in lines for row in line[0]["rows"]) == sorted(alone["rows"])
