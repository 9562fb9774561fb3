"""The data module: what it tells the model, and that a resume is refused when the order would be another."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_cache
import torch
from lightning import LightningModule, Trainer

from sparsepilot.config.signature import check_fields
from sparsepilot.data.datamodule import ActivationData
from sparsepilot.data.sites import expand_sites
from sparsepilot.errors import CheckpointError, ConfigError, DataError
from sparsepilot.types import Batch

SITE, SMALL = tiny_cache.WIDTHS


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_cache.sealed(tmp_path_factory.mktemp("cache") / "c").path)


def data(path: str, **changed: object) -> ActivationData:
    fields = {"sites": [SITE, SMALL], "num_streams": 4, "window_mb": 1, "val_batch": 64}
    fields |= {"batch": 32, "accumulate": 2, "total_samples": 640, "seed": 1}
    return ActivationData(path, **fields | changed)  # type: ignore[arg-type]


def test_sites_side_by_side(path: str) -> None:
    module = data(path, sites=[SMALL, SITE])
    assert module.d_in == 32
    batch = next(iter(module.train_dataloader()))
    assert batch.x_BD.shape == (16, 32)
    row = int(module.order.batch_rows(0, 32)[0])
    assert torch.equal(batch.x_BD[0, 8:], module.cache.read(SITE, row, row + 1)[0])


def test_globs_stand_for_the_sites_of_the_cache(path: str) -> None:
    module = data(path, sites=["model.layers.*.mlp:in", "model.layers.*", "model.layers.1:out"])
    assert module.sites == [SMALL, SITE]
    assert module.d_in == 32
    known = sorted(f"model.layers.{layer}.mlp{side}" for layer in range(12) for side in ("", ":in"))
    wanted = [f"model.layers.{layer}.mlp" for layer in range(12)]
    assert expand_sites(["model.layers.*.mlp"], known, "here") == wanted
    assert expand_sites(["model.layers.11.mlp", "model.layers.1?.mlp"], known, "here") == [wanted[11], wanted[10]]


@pytest.mark.parametrize("field", ["num_streams", "window_mb", "prefetch_batches", "val_batch", "val_rows"])
def test_the_signature_carries_the_ranges(path: str, field: str) -> None:
    given = ("batch", "accumulate", "total_samples", "seed")
    check_fields("data", {"path": path, "sites": [SITE], field: 1}, ActivationData, given)
    with pytest.raises(ConfigError, match=f"data.{field} = 0: should be greater than 0"):
        check_fields("data", {"path": path, "sites": [SITE], field: 0}, ActivationData, given)


def test_resuming_takes_up_the_position_and_refuses_another_order(path: str, tmp_path: Path) -> None:
    first = data(path)
    first.start_sample = 320
    state = first.state_dict()
    assert state["samples"] == 320
    second = data(path, batch=64)  # the batch is no part of the order
    second.load_state_dict(state)
    rest = list(second.train_dataloader())
    assert len(rest) == 10
    assert rest[0].first_sample == 320
    other = tiny_cache.sealed(tmp_path / "other", "float16").path
    for changed, field in [
        (data(path, seed=2), "seed is 2 and was 1"),
        (data(path, num_streams=8), "num_streams is 8 and was 4"),
        (data(path, window_mb=2), "window_rows_per_stream is"),
        (data(str(other)), "fingerprint is"),
    ]:
        with pytest.raises(CheckpointError, match=f"data.{field}.* in the checkpoint"):
            changed.load_state_dict(state)


def test_errors_come_on_construction(path: str) -> None:
    with pytest.raises(DataError, match="no site 'model.layers.1.mlp:out' in this cache; did you mean"):
        data(path, sites=["model.layers.1.mlp:out"])
    with pytest.raises(DataError, match=r"no site 'model.layer.\*.mlp:in' in this cache; did you mean"):
        data(path, sites=["model.layer.*.mlp:in"])
    with pytest.raises(ConfigError, match="batch=36 is not a multiple"):
        data(path, batch=36)
    with pytest.raises(ConfigError, match="names a site twice"):
        data(path, sites=[SITE, SITE])
    with pytest.raises(ConfigError, match="names nothing to read"):
        data(path, sites=[])


class Counter(LightningModule):
    """Trains nothing; its clock is what the data module saves."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0
        self.seen: list[int] = []
        self.num_val_rows = 0
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.seen.append(batch.first_sample)
        self.samples = batch.first_sample + 32
        return self.weight * batch.x_BD.float().sum()

    def validation_step(self, batch: Batch, _: int) -> None:
        self.num_val_rows += len(batch.x_BD)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_inside_a_trainer(path: str, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=2,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )

    model, module = Counter(), data(path)
    run = trainer()
    run.fit(model, module)
    assert model.seen == [s for s in range(0, 640, 32) for _ in range(2)]
    assert model.num_val_rows == 130
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["ActivationData"]
    assert saved["samples"] == 640
    assert saved["fingerprint"] == module.cache.fingerprint
