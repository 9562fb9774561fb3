"""One rank and many: the same rows, the same losses, the same control, and ranks that hold the same bits.

Every rank is a process of its own, gloo between them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import TINY
from warm import Ended, Warm

from sparsepilot.rows import read_rows, rows_of_trainee

pytestmark = pytest.mark.slow  # a hundred processes

STEPS, BATCH = 30, 256
WATCHED = "tests/distributed/watched.py"
OPTIONS = (
    *TINY,
    # more latents than features, and a short window: some are dead after a while, so that AuxK and resampling act
    *("model.d_sae=128", f"samples={STEPS * BATCH}", "callbacks.log_every_steps=1"),
    f"callbacks.validate_every_samples={BATCH * 10}",
)
CASES: dict[str, tuple[str, ...]] = {
    "topk": ("model=topk", "model.k=2"),
    "topk, annealed, multi": ("model=topk", "model.k=2", "model.anneal_k_from=16", "model.multi_topk=0.125"),
    "batchtopk": ("model=batchtopk", "model.k=2.5"),
    "matryoshka": ("model=matryoshka", "model.k=2.5"),
    "random prefixes": ("model=topk", "model.k=3", "model/prefixes=random"),
    "jumprelu": ("model=jumprelu", "controller=ramp", "controller.end=0.5"),
    "jumprelu, steered": (
        *("model=jumprelu", "model/revival=aux_k", "model.threshold=2"),  # so high that some latents never fire
        *("controller=l0_target", "controller.target_l0=1"),
    ),
    "as sparse as FVU allows": (
        *("model=relu", "controller=constrained", "controller.target=0.8", "controller.wait=0.1"),
        *("controller.climb=3", "controller.recover=3", "controller.lag_steps=2"),
    ),
    "through a frontier": (
        *("model=relu", "controller=pareto", "controller.targets=[16,8]", "controller.lag_steps=2"),
    ),
    "jumprelu tanh": ("model=jumprelu", "model.recipe=tanh", "model/revival=pre_activation"),
    "gated": ("model=gated", "model/revival=aux_k"),
    "relu": ("model=relu", "controller=ramp"),
    "relu, p-annealed": ("model=relu", "model.penalty=p", "model.p_start_fraction=0"),
    "resampling": ("model=topk", "model.k=2", "model/revival=resample", "model.revival.every_samples=1280"),
    "accumulated": ("model=batchtopk", "model.k=2", "accumulate=2"),
    "muon": ("model=topk", "model.k=2", "optimizer=muon"),
}


WORLDS = {
    **dict.fromkeys(("topk", "batchtopk", "jumprelu, steered"), (2, 4)),
    **dict.fromkeys(("resampling", "accumulated"), (4,)),
}
"""How many ranks train a case; for the others two must do."""
DIVIDED = {
    "topk": (2, 4),
    "batchtopk": (2, 4),
    "jumprelu, steered": (2, 4),
    "resampling": (2,),
    "accumulated": (2,),
    "muon": (2,),
}
"""Cases that are trained with parameters divided among ranks, too, and among how many."""
SENSITIVE = {"relu, p-annealed": 5, "muon": 5}
"""Cases that blow rounding up (u^p where u is nearly 0; orthogonalising in bfloat16), and for how many steps they
agree. One rank with two micro-batches drifts from one rank with one just as fast."""
BY_QUALITY = ("as sparse as FVU allows",)
"""Cases whose strength hangs on a sum of rounded numbers, not on counts: within 1e-5, and equal on all ranks."""


class Run(NamedTuple):
    """What a run of several ranks has left."""

    rows: list[dict[str, Any]]
    ranks: list[list[dict[str, Any]]]
    """what each rank has seen in each step"""


class Lab:
    """The warm server and the cache."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        self.options = [*OPTIONS, f"data.path={folder}/cache"]
        self._alone: dict[str, Run] = {}

    def one(self, case: str) -> Run:
        """One process's run, made when it is first asked for."""
        if case not in self._alone:
            self._alone[case] = self.run(self.folder / f"one-{len(self._alone)}", 1, *CASES[case])
        return self._alone[case]

    def run(self, folder: Path, world: int, *options: str, trainer: str = "ddp_gloo") -> Run:
        """Trains with so many ranks, all of which must end well."""
        for rank, ended in enumerate(self.start(folder, world, *options, trainer=trainer)):
            assert ended.code == 0, f"rank {rank}: {ended.out}"
            assert rank == 0 or ended.out == "", ended.out  # one of them talks
        files = [folder.with_name(f"{folder.name}-{rank}.jsonl") for rank in range(world)]
        seen = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return Run(list(read_rows(folder / "metrics.jsonl")), seen)

    def start(self, folder: Path, world: int, *options: str, trainer: str = "ddp_gloo") -> list[Ended]:
        """The same, however they end."""
        environment = {"WATCHED": str(folder.with_name(f"{folder.name}-{{rank}}.jsonl"))}
        arguments = [WATCHED, *self.options, f"run_dir={folder}", *options]
        if world == 1:
            return [self.warm(arguments, environment)]
        ranks = [f"trainer={trainer}", f"trainer.devices={world}"]
        return self.warm.ranks(world, arguments + ranks, environment)


@pytest.fixture(scope="module")
def lab(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), warm)


def assert_same_training(one: Run, many: Run, steps: int, by_quality: bool) -> None:
    """Counts and controls equal, measurements (and controls that hang on them) within 1e-5."""
    assert len(one.rows) == len(many.rows)
    for a, b in zip(one.rows, many.rows, strict=True):
        if a["step"] > steps:
            break
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float) and (key != "controller/strength" or by_quality):
                nearly_0 = 1e-6 if by_quality and key.startswith("controller/") else 1e-9  # an error is in nats
                assert b[key] == pytest.approx(value, rel=1e-5, abs=nearly_0), (key, a["step"])
            else:
                assert b[key] == value, (key, a["step"])


@pytest.mark.parametrize("case", ["topk", "batchtopk", "jumprelu", "resampling"])
def test_reproducible_training_has_the_same_bits_on_any_number_of_ranks(lab: Lab, tmp_path: Path, case: str) -> None:
    options = (*CASES[case], "trainer.reproducible=true", f"samples={20 * BATCH}")
    one = lab.run(tmp_path / "one", 1, *options)
    for world in (2, 8) if case == "topk" else (4,):
        many = lab.run(tmp_path / f"ranks{world}", world, *options)
        for alone, *ranks in zip(one.ranks[0], *many.ranks, strict=True):
            assert all(rank["digests"] == alone["digests"] for rank in ranks), (world, alone["step"])


def test_gradients_in_bfloat16_train_nearly_as_well(lab: Lab, tmp_path: Path) -> None:
    exact = lab.run(tmp_path / "exact", 2, *CASES["topk"])
    rounded = lab.run(tmp_path / "rounded", 2, *CASES["topk"], "trainer.strategy.gradients=bfloat16")
    for a, b in zip(*rounded.ranks, strict=True):
        assert a["digests"] == b["digests"]
    assert exact.ranks[0][0]["digests"] != rounded.ranks[0][0]["digests"]
    losses = [[row["train/loss"] for row in run.rows if "train/loss" in row] for run in (exact, rounded)]
    assert losses[0][0] == losses[1][0]  # the first forward pass: no gradient has been sent yet
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.02)


@pytest.mark.parametrize("trainer", ["ddp_gloo", "fsdp_cpu"])
def test_trainees_of_many_ranks_are_their_runs_alone(lab: Lab, tmp_path: Path, trainer: str) -> None:
    """Bit for bit at the same number of ranks, rows and parameters; BatchTopK selects over both ranks."""
    given = {"small": ("model.d_sae=96", "model.k=3"), "batch": ("model.k=2.5",)}
    own = [f"++trainees.{name}.{option}" for name, options in given.items() for option in options]
    own += ["+model@trainees.batch.model=batchtopk", "trainees.batch.model.d_sae=128"]
    both = lab.run(tmp_path / "both", 2, *own, trainer=trainer)
    for name, options in given.items():
        model = "batchtopk" if name == "batch" else "topk"
        alone = lab.run(tmp_path / name, 2, f"model={model}", *options, trainer=trainer)
        assert list(rows_of_trainee(both.rows, name, given)) == alone.rows
        begin = f"trainees.{name}."
        for ours, theirs in zip(both.ranks[1], alone.ranks[1], strict=True):
            digests = {key.removeprefix(begin): d for key, d in ours["digests"].items() if key.startswith(begin)}
            expected = {key: d for key, d in theirs["digests"].items() if key.startswith("trainees.sae.")}
            assert digests == {key.removeprefix("trainees.sae."): d for key, d in expected.items()}


@pytest.mark.parametrize("case", CASES)
def test_many_ranks_train_as_one(lab: Lab, tmp_path: Path, case: str) -> None:
    one = lab.one(case)
    assert one.ranks[0][-1]["step"] == STEPS
    for world in WORLDS.get(case, (2,)):
        assert_trained_as_one(case, one, lab.run(tmp_path / f"ranks{world}", world, *CASES[case]))


@pytest.mark.parametrize(("case", "world"), [(case, world) for case, worlds in DIVIDED.items() for world in worlds])
def test_ranks_that_divide_the_parameters_train_as_one(lab: Lab, tmp_path: Path, case: str, world: int) -> None:
    many = lab.run(tmp_path / "many", world, *CASES[case], trainer="fsdp_cpu")
    assert_trained_as_one(case, lab.one(case), many)


def assert_trained_as_one(case: str, one: Run, many: Run) -> None:
    """The same rows, losses, counts and controls, and ranks that hold the same bits."""
    by_quality = case in BY_QUALITY
    assert_same_training(one, many, SENSITIVE.get(case, STEPS), by_quality)
    for alone, *ranks in zip(one.ranks[0], *many.ranks, strict=True):
        if "accumulate=2" not in CASES[case]:
            assert [row for rank in ranks for row in rank["rows"]] == alone["rows"]
        assert sorted(row for rank in ranks for row in rank["rows"]) == sorted(alone["rows"])
        assert all(rank["digests"] == ranks[0]["digests"] for rank in ranks)
        assert all(rank["strength"] == ranks[0]["strength"] for rank in ranks)
        assert ranks[0]["strength"] == (pytest.approx(alone["strength"], rel=1e-5) if by_quality else alone["strength"])
        assert all(rank["without_gradient"] == [] for rank in ranks)
