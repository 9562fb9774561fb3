"""Several caches of the same rows are one cache of all their sites; caches of other rows are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_cache
import torch
from conftest import Compose
from torch import Tensor

import sparsepilot
from sparsepilot.config.check import check, check_cache
from sparsepilot.data import layout
from sparsepilot.data.datamodule import ActivationData
from sparsepilot.errors import CheckpointError, ConfigError, DataError
from sparsepilot.run import train

SITE, SMALL = tiny_cache.WIDTHS
TOGETHER = [f"chat/{SMALL}", f"base/{SITE}"]


def one_site(path: Path, site: str, dtype: str = "bfloat16", **changed: Any) -> str:
    return str(tiny_cache.sealed(path, dtype, widths={site: tiny_cache.WIDTHS[site]}, **changed).path)


def data(path: str | dict[str, str], sites: list[str], **changed: Any) -> ActivationData:
    fields = {"num_streams": 4, "window_mb": 1, "val_batch": 64, "batch": 32, "accumulate": 2, "total_samples": 1600}
    return ActivationData(path, sites, **{**fields, "seed": 1, **changed})


def batches(module: ActivationData) -> list[Tensor]:
    return [batch.x_BD for loader in (module.train_dataloader(), module.val_dataloader()) for batch in loader]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`both` holds two sites, `base` and `chat` one of them each, in shards of other sizes."""
    folder = tmp_path_factory.mktemp("caches")
    tiny_cache.sealed(folder / "both")
    one_site(folder / "base", SITE)
    one_site(folder / "chat", SMALL, shard_rows=64)
    return folder


def paths(folder: Path, **changed: Path | str) -> dict[str, str]:
    return {name: str(path) for name, path in {"base": folder / "base", "chat": folder / "chat", **changed}.items()}


def test_two_caches_give_the_batches_of_one_that_holds_both_sites(folder: Path) -> None:
    module, one = data(paths(folder), TOGETHER), data(str(folder / "both"), [SMALL, SITE])
    assert all(torch.equal(a, b) for a, b in zip(batches(module), batches(one), strict=True))
    assert [module.cache.widths[site] for site in module.sites] == [8, 24]
    for together, alone in zip(TOGETHER, [SMALL, SITE], strict=True):
        assert torch.equal(module.cache.stats(together).mean_D, one.cache.stats(alone).mean_D)
    assert module.cache.source == {"base": {"kind": "test"}, "chat": {"kind": "test"}}


@pytest.mark.parametrize(("dtype", "batch_dtype"), [("int8", torch.float32), ("float16", torch.float32)])
def test_number_formats_and_chunks_may_differ(folder: Path, tmp_path: Path, dtype: str, batch_dtype: Any) -> None:
    """The columns of each are its own rows, in the order of the larger chunks, whatever they are stored as."""
    other = one_site(tmp_path / "chat", SMALL, dtype, chunk_rows=16)
    module = data(paths(folder, chat=other), TOGETHER)
    assert module.order.chunk_rows == 32
    own = torch.cat([module.cache.read(site, 0, 830).float() for site in TOGETHER], dim=1)
    *train_batches, last = [batch.x_BD for batch in module.train_dataloader()]
    assert last.dtype == batch_dtype
    for number, x_BD in enumerate(train_batches[::2]):
        rows = torch.from_numpy(module.order.batch_rows(32 * number, 32)).view(4, 2, 4)[:, 0].flatten()
        assert torch.equal(x_BD, own[rows])
    assert torch.equal(torch.cat([batch.x_BD for batch in module.val_dataloader()]), own[700:])


def test_globs_say_which_caches_they_mean(folder: Path) -> None:
    assert data(paths(folder), ["chat/*.*.*.mlp:in", "*/model.layers.*"]).sites == TOGETHER
    with pytest.raises(DataError, match=f"no site '{SITE}' in this cache; did you mean 'base/{SITE}'"):
        data(paths(folder), [SITE])
    with pytest.raises(DataError, match=r"no site 'base/model.layers.\*.mlp:in' in this cache"):
        data(paths(folder), ["base/model.layers.*.mlp:in"])


def test_a_resume_goes_on_with_the_same_rows_and_refuses_other_caches(folder: Path, tmp_path: Path) -> None:
    whole = data(paths(folder), TOGETHER)
    state = whole.state_dict() | {"samples": 800}
    rest = data(paths(folder), TOGETHER)
    rest.load_state_dict(state)
    ours = [batch.x_BD for batch in whole.train_dataloader()][50:]
    assert all(torch.equal(a, b.x_BD) for a, b in zip(ours, rest.train_dataloader(), strict=True))
    swapped = {"base": str(folder / "both"), "chat": str(folder / "both")}
    for other in (swapped, paths(folder, chat=one_site(tmp_path / "chat", SMALL, "float16"))):
        with pytest.raises(CheckpointError, match=r"data.fingerprint is .* in the checkpoint"):
            data(other, TOGETHER).load_state_dict(state)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_tokens": 60}, "the token of row 50 is 0 in the first and 50 in the second"),
        ({"num_train_rows": 699}, "num_train_rows is 700 in the first and 699 in the second"),
        ({"num_val_rows": 129}, "num_val_rows is 130 in the first and 129 in the second"),
    ],
)
def test_caches_of_other_rows_are_refused(folder: Path, tmp_path: Path, changed: Any, message: str) -> None:
    other = one_site(tmp_path / "chat", SMALL, **changed)
    with pytest.raises(DataError) as error:
        data(paths(folder, chat=other), TOGETHER)
    assert str(error.value).startswith(f"{folder}/base and {other} hold different rows: ")
    assert message in str(error.value)


def test_equal_digests_of_the_harvest_spare_reading_the_tokens(tmp_path: Path) -> None:
    source = {"rows_digest": "abc"}
    both = {"base": one_site(tmp_path / "base", SITE, source=source)}
    both["chat"] = one_site(tmp_path / "chat", SMALL, source=source)
    layout.shard_file(tmp_path / "chat", "tokens", 0).write_bytes(
        bytes(layout.shard_file(tmp_path / "chat", "tokens", 0).stat().st_size)
    )
    data(both, TOGETHER)


def test_damage_names_the_cache_that_has_it(folder: Path, tmp_path: Path) -> None:
    other = one_site(tmp_path / "chat", SMALL)
    file = layout.shard_file(tmp_path / "chat", layout.site_array(SMALL), 2)
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=f"^{other}: array 'activations/{SMALL}', chunk 8"):
        list(data(paths(folder, chat=other), TOGETHER).train_dataloader())


def test_names_that_cannot_be_are_refused(folder: Path, compose_cfg: Compose) -> None:
    with pytest.raises(ConfigError, match=r"data.path.chat = .*: data.sites names none of its sites"):
        data(paths(folder), [f"base/{SITE}"])
    with pytest.raises(ConfigError, match=r"data.path.a.b = .*: a cache's name is made of letters"):
        data({"a.b": str(folder / "base")}, [f"a.b/{SITE}"])
    words = ("data=lm", "data.path={base: a, chat: b}", "data.sites=[base/x]")
    for refuses, config in ((check, "train"), (check_cache, "cache")):
        with pytest.raises(ConfigError, match="data.build makes one cache; make each by itself"):
            refuses(compose_cfg(*words, config=config))


def test_training_on_two_caches_is_training_on_one_that_holds_both(
    folder: Path, tmp_path: Path, compose_cfg: Compose
) -> None:
    common = ["data=cache", "data.num_streams=4", "batch=64", "samples=1280", "model.d_sae=64", "model.k=4"]
    common += ["logger=none", "report=false"]
    runs = {
        "one": (f"data.path={folder}/both", f"data.sites=[{SMALL!r}, {SITE}]"),
        "two": (
            f"data.path={{base: {folder}/base, chat: {folder}/chat}}",
            "data.sites=[chat/*.*.*.mlp:in, */model.layers.1]",
        ),
    }
    ours = {name: train(compose_cfg(*common, *words, f"run_dir={tmp_path}/{name}")) for name, words in runs.items()}
    assert ours["one"]["metrics"] == ours["two"]["metrics"]
    one, two = (sparsepilot.load(tmp_path / name) for name in runs)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert two.cfg["sites"] == TOGETHER
    assert two.cfg["blocks"] == "crosscoder"
    again = train(compose_cfg(*common, *runs["two"], "samples=1920", f"run_dir={tmp_path}/two"))
    assert again["samples"] == 1920
