"""What all tests share: one thread per process (several run side by side), and in-process training runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # for `killing`
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from parsed_once import parse_once

from sparsepilot.config.resolvers import register_resolvers
from sparsepilot.config.schema import register

parse_once()

if TYPE_CHECKING:
    from warm import Warm

ROOT = Path(__file__).parents[1]
TINY = (
    "data=synthetic",
    "data.build.num_rows=6000",
    "data.build.num_val_rows=512",
    "data.build.d_in=16",
    "data.build.num_features=32",
    "data.num_streams=8",
    "model.d_sae=64",
    "data.build.mean_active=4",
    "batch=256",
    "samples=5120",
    "callbacks.validate_every_samples=2560",  # not twenty times, once in each step
    "logger=none",
    "report=false",
)
"""A run of 20 steps that takes a second."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real Slurm first: its tests wait more than they compute, and one process alone can run them."""
    items.sort(key=lambda item: "slurm" not in item.path.parts)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    from warm import Warm  # imports torch's and Lightning's halves that most files of tests do not need

    made = Warm(tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


Compose = Callable[..., DictConfig]
Train = Callable[..., dict[str, Any]]


@pytest.fixture
def compose_cfg() -> Compose:
    """compose_cfg("model.k=3", config="train"): the configuration as an entry point would see it."""
    register()
    register_resolvers()

    def make(*overrides: str, config: str = "train") -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(config, overrides=list(overrides))

    return make


@pytest.fixture
def train_tiny(compose_cfg: Compose, tmp_path: Path) -> Train:
    """train_tiny("run_dir=...", ...): a tiny run in this process; the cache lies in tmp_path/cache."""
    from sparsepilot.run import train

    def run(*overrides: str) -> dict[str, Any]:
        places = (f"data.path={tmp_path}/cache", f"run_dir={tmp_path}/run")
        return train(compose_cfg(*TINY, *places, *overrides))

    return run


@pytest.fixture(params=[1.0, 0.0], ids=["sparse", "dense"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that `shapes.make` makes take the one path, then the other."""
    import shapes

    monkeypatch.setattr(shapes, "DENSE_ABOVE", request.param)


@pytest.fixture(scope="session")
def three_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache of 3,000 rows: sites a, b, c see the same planted rows in turned coordinates, each larger."""
    import numpy as np

    from sparsepilot.data.plan import CachePlan
    from sparsepilot.data.synthetic import PlantedRows
    from sparsepilot.data.writer import CacheWriter, create

    path = tmp_path_factory.mktemp("sites") / "cache"
    plan = CachePlan(3000, 500, dict.fromkeys("abc", 16), "float32", 32, 512, {"kind": "test"})
    create(path, plan)
    planted = PlantedRows(16, 32, 4, 0.02, 0)
    x_BD = torch.cat([x for x, _ in planted.rows(1, 0, 3500)])
    make = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(16, 16, generator=make))[0] for _ in "abc"]
    writer = CacheWriter(path)
    for rows in writer.pending():
        part_BD = x_BD[rows.start : rows.stop]
        sites = {site: 10.0**i * part_BD @ turn for i, (site, turn) in enumerate(zip("abc", turns, strict=True))}
        numbers = np.arange(rows.start, rows.stop)
        writer.write_shard(rows, sites, numbers % 50, numbers % 100, numbers // 100)
    writer.finish()
    return path


@pytest.fixture
def train_sites(compose_cfg: Compose, three_sites: Path, tmp_path: Path) -> Train:
    """train_sites("model=relu", ...): four steps on sites a, b and c."""
    from sparsepilot.run import train

    tiny = (
        "data=cache", f"data.path={three_sites}", "data.sites=[a,b,c]", "data.num_streams=8", "model.d_sae=48",
        "batch=256", "samples=1024", "callbacks.validate_every_samples=512", "logger=none", "report=false",
        f"run_dir={tmp_path}/run",
    )  # fmt: skip

    def run(*overrides: str) -> dict[str, Any]:
        return train(compose_cfg(*tiny, *overrides))

    return run
