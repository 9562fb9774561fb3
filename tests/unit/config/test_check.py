"""Every bad value is one clear line that names the field, the value and what would be right."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from omegaconf import DictConfig
from warm import Warm

from sparsepilot.caching import check_recipe
from sparsepilot.config.check import check, check_cache
from sparsepilot.config.cli import one_line
from sparsepilot.config.resume import allowed_changes
from sparsepilot.data.cache import Cache
from sparsepilot.errors import ConfigError, DataError
from sparsepilot.ranks import own_cpus

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_sae=-4", "model.d_sae = -4: should be greater than 0"),
        ("model.k=3.5", "model.k = 3.5: should be a valid integer"),
        ("model.k=5000", "model.k = 5000: at most model.d_sae = 512 latents can be active"),
        ("+model.kk=3", "model.kk = 3: there is no such field; did you mean 'k'"),
        ("model.k=null", "model.k = None: should be a valid integer"),
        ("batch=1000", "batch = 1000: must be a multiple of data.num_streams x accumulate = 64 x 1, e.g. 960 or 1024"),
        ("accumulate=3", "batch = 512: must be a multiple of data.num_streams x accumulate = 64 x 3"),
        ("samples=0", "samples = 0: at least 1 is needed"),
        ("samples=100", "samples = 100: the budget is less than one batch of 512"),
        ("optimizer.lr=-1", "optimizer.lr = -1: a positive learning rate is needed"),
        ("+optimizer.betaas=1", "optimizer.betaas = 1: there is no such field; did you mean 'betas'?"),
        ("clip_norm=0", "clip_norm = 0.0: a positive norm is needed"),
        ("controller.strength=-1", "controller.strength = -1: should be greater than or equal to 0"),
        ("+schedule.warmup=5", "schedule.warmup = 5: there is no such field; did you mean 'warmup_samples'?"),
        (
            "model._target_=sparsepilot.autoencoders.topk.TopKK",
            "model._target_ = 'sparsepilot.autoencoders.topk.TopKK'",
        ),
        ("+data.build.featurs=3", "data.build.featurs = 3: there is no such field"),
        ("callbacks.checkpoint_every_minutes=0", "callbacks.checkpoint_every_minutes = 0.0: a positive time is needed"),
        ("model.d_sae=???", "model.d_sae: missing; set model.d_sae=..."),
        ("+trainer.devicez=2", "trainer.devicez = 2: there is no such field; did you mean 'devices'?"),
        ("+model.revival.aux=3", "model.revival.aux = 3: there is no such field; did you mean 'aux_k'?"),
        ("model.revival.aux_k=0", "model.revival.aux_k = 0: should be greater than 0"),
        ("model.revival.aux_k=600", "model.revival.aux_k = 600: at most model.d_sae = 512"),
        ("model.revival.coefficient=-1", "model.revival.coefficient = -1: should be greater than or equal to 0"),
        ("model.tile_latents=0", "model.tile_latents = 0: should be greater than 0"),
        ("model.dense_above=-0.1", "model.dense_above = -0.1: should be greater than or equal to 0"),
        ("model.multi_topk=-1", "model.multi_topk = -1: should be greater than or equal to 0"),
        ("model.anneal_k_fraction=0", "model.anneal_k_fraction = 0: should be greater than 0"),
        ("model.sites=synthetic", "model.sites = 'synthetic': "),
        ("model.sites=[3]", "model.sites"),
        (
            "model.sites={reads:[synthetic],write:[synthetic]}",
            "a transcoder wants read: [sites] and write: [sites]",
        ),
        ("model.skip=true", "model.skip = True: only a transcoder has a skip"),
        ("model.sites=[]", "model.sites = []: names nothing to read"),
        ("model.sites={read:synthetic,write:[synthetic]}", "model.sites"),
        ("model.skip=7", "model.skip = 7: should be a valid boolean"),
        ("+model.skips=true", "model.skips = True: there is no such field"),
        ("trainer.precision=16-mixed", "trainer.precision = '16-mixed': should be one of 32-true, bf16-mixed"),
        ("trainer.precision=64", "trainer.precision"),
        ("model.d_sae=1e2", "model.d_sae = 100.0: should be a valid integer; write 100"),
        ("data.window_mb=4.0", "data.window_mb = 4.0: should be a valid integer; write 4"),
        ("data.num_streams=8.0", "data.num_streams = 8.0: should be a valid integer; write 8"),
        ("trainer.devices=2.0", "trainer.devices = 2.0: should be a valid integer; write 2"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': should be a valid number"),
        ("optimizer.betas=[0.9,x]", "optimizer.betas = [0.9, 'x']: should be a valid number"),
        ("logger.wandb=null", "logger.wandb = None: a mapping of its fields is needed; use logger=none"),
        ("logger.wandb=false", "logger.wandb = False: a mapping of its fields is needed; use logger=none"),
        ("+logger.x=3", "logger.x = 3: a mapping of its fields is needed; use logger=none"),
        (
            "callbacks.disturb=true",
            "callbacks.disturb = True: a mapping of its fields is needed; null disturbs nothing",
        ),
        ("data.build=true", "data.build = True: a mapping of its fields is needed; null builds nothing"),
        ("data.build._target_=null", "data.build._target_ = None: the dotted name of a class or a function is needed"),
        ("+trainer.strategy={features:2}", "trainer.strategy = {'features': 2}"),
        ("~schedule._target_", "schedule._target_ = None: the dotted name"),
    ],
)
def test_bad_values(compose_cfg, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(compose_cfg("data=synthetic", override))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=relu", "model.penalty=l3"), "model.penalty = 'l3': should be 'l1', 'tanh', 'log' or 'p'"),
        (("model=relu", "model.p_end=1.5"), "model.p_end = 1.5: should be less than or equal to 1"),
        (("model=relu", "model.p_start_fraction=1"), "model.p_start_fraction = 1: should be less than 1"),
        (("model=jumprelu", "model.recipe=wide"), "model.recipe = 'wide': should be 'step' or 'tanh'"),
        (("model=jumprelu", "model.threshold=0"), "model.threshold = 0: should be greater than 0"),
        (("model=jumprelu", "+model.k=3"), "model.k = 3: there is no such field"),
        (("model=batchtopk", "model.k=0"), "model.k = 0: should be greater than 0"),
        (("model=batchtopk", "model.threshold_momentum=1"), "model.threshold_momentum = 1: should be less than 1"),
        (("model=matryoshka", "model.prefixes.fractions=[0.5,0]"), "model.prefixes.fractions"),
        (("model=topk", "model/prefixes=random", "model.prefixes.count=0"), "model.prefixes.count = 0: should be"),
        (("model=topk", "model/revival=resample", "model.revival.until=0"), "model.revival.until = 0: should be"),
        (("model=gated", "model.coefficient=-1"), "model.coefficient = -1: should be greater than or equal to 0"),
        (("controller=ramp", "controller.until=0"), "controller.until = 0: should be greater than 0"),
        (("model=topk", "model/revival=resample", "model.revival.until=7"), "model.revival.until = 7: should be less"),
        (
            ("trainer=ddp_gloo", "trainer.devices=4", "data.num_streams=2"),
            "4 ranks cannot share data.num_streams = 2 equally; so many can: 1, 2",
        ),
        (("model=topk", "model.anneal_k_from=5000"), "model.anneal_k_from = 5000: should lie between model.k"),
        (("model=topk", "model.k=8", "model.anneal_k_from=2"), "model.anneal_k_from = 2: should lie between model.k"),
        (("callbacks.best_by=val/ce",), "callbacks.best_by = val/ce: is not measured; set cross_entropy=spliced"),
        (("trainer=fsdp_cpu", "trainer.reproducible=true"), "trainer.reproducible = True: needs whole gradients"),
        (("optimizer=adamw", "optimizer.eps=-1"), "Invalid epsilon value: -1"),
        (("optimizer=adam", "optimizer.betas=[0.9,1.0]"), "Invalid beta parameter at index 1"),
        (("optimizer=muon", "optimizer.ns_steps=100"), "optimizer.ns_steps = 100: should be less than 100"),
        (
            ("model.sites={read:[a],write:[b],cross_layer:true}", "model.skip=true"),
            "model.skip = True: a linear skip over all layers",
        ),
    ],
)
def test_bad_values_of_the_other_models(compose_cfg, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(compose_cfg("data=synthetic", *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("trainer.devices=4", "trainer.strategy.features=3"),
            "trainer.strategy.features = 3: must divide the 4 ranks; so many do: 1, 2, 4",
        ),
        (("trainer.strategy.features=0",), "trainer.strategy.features = 0: should be greater than 0"),
        (("model.d_sae=513",), "model.d_sae = 513: must be a multiple of 2, the ranks that share the latents"),
        (("optimizer=muon",), "optimizer=muon: needs whole matrices, whose rows lie on 2 ranks here"),
        (("trainer.reproducible=true",), "trainer.reproducible = True: "),
        (("compile=true",), "compile = True: "),
        (
            ("model.sites={read:[a,b],write:[c,d],cross_layer:true}",),
            "model.sites.cross_layer = True: its latents cannot be dealt out to 2 ranks; use trainer=ddp or fsdp",
        ),
        (
            ("trainer.devices=6", "trainer.strategy.features=2"),
            "3 groups of 2 ranks cannot share data.num_streams = 64 equally; so many can: 2, 4, 8, 16, 32, 64, 128",
        ),
    ],
)
def test_what_latents_on_several_ranks_cannot_do(compose_cfg, overrides: tuple[str, ...], message: str) -> None:
    base = ("data=synthetic", "trainer=feature_parallel_cpu")
    check(compose_cfg(*base, "trainer.devices=3", "model.d_sae=513"))  # the streams are not dealt out
    with pytest.raises(ConfigError) as error:
        check(compose_cfg(*base, *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_ramp_that_ends_before_it_begins(compose_cfg) -> None:
    from sparsepilot.config.instantiate import instantiate

    with pytest.raises(ConfigError, match=r"controller\.begin = 0\.5: must lie before controller\.until = 0\.25"):
        instantiate(compose_cfg("controller=ramp", "controller.begin=0.5").controller)


def _options() -> list[str]:
    groups = (
        "model",
        "controller",
        "optimizer",
        "schedule",
        "trainer",
        "logger",
        "data",
        "lm",
        "text",
        "cross_entropy",
        "experiment",
        "debug",
    )
    nested = [f"model/{group}={file.stem}" for group in ("revival", "prefixes")
              for file in sorted((ROOT / "conf" / "model" / group).glob("*.yaml"))]  # fmt: skip
    return nested + [
        f"{group}={file.stem}" for group in groups for file in sorted((ROOT / "conf" / group).glob("*.yaml"))
    ]


@pytest.mark.parametrize("option", _options())
def test_every_option_of_every_group_passes(compose_cfg, option: str) -> None:
    """A file added to a group is tested without an edit here; what it leaves open is filled in."""
    filling = {
        "data=cache": ("data.path=/x", "data.sites=[a]"),
        "data=lm": ("data.path=/x", "data.sites=[a]"),
        "lm=hf": ("lm.id=gpt2",),
        "text=files": ("text.paths=[a.txt]",),
        "text=hf_dataset": ("text.name=a/b",),
    }
    cfg: DictConfig = compose_cfg(option, *filling.get(option, ()))
    check(cfg)
    assert cfg.run_dir.startswith("runs/")
    if option.startswith(("data", "lm", "text")) and option not in ("data=cache", "data=live"):
        check_cache(compose_cfg(option, *filling.get(option, ()), config="cache"))


@pytest.mark.slow  # six processes, each of which imports Hydra
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.kk=3", "error: model.kk = 3: there is no such field; did you mean 'k'?"),
        ("batch=abc", "error: batch = 'abc': should be an integer"),
        ("samples=1e9", "error: samples = '1000000000.0': should be an integer; write 1000000000"),
        ("model=topkk", "error: model=topkk: there is no conf/model/topkk.yaml; did you mean 'topk'?"),
        ("resume=maybe", "error: resume = maybe: Invalid value 'maybe', expected one of [auto, never]"),
        ("data.sites=[a]", "error: cache/none: no activation cache here"),
    ],
)
def test_the_command_line_prints_one_line(warm: Warm, tmp_path: Path, argument: str, message: str) -> None:
    command = [str(ROOT / "train.py"), "data=cache", "data.path=cache/none", "data.sites=[b]", argument]
    done = warm.script(command, tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())  # nothing was written, not even a run folder


def test_what_cannot_be_read_is_not_said_to_be_written(compose_cfg) -> None:
    from sparsepilot.config.plain import plain_values

    refused = PermissionError(errno.EACCES, "Permission denied", "/theirs/cache/manifest.json")
    assert one_line(refused) == "no access to /theirs/cache/manifest.json: Permission denied"
    path = "x" * 300  # the system refuses to look, as it does below a folder without permission
    plain = plain_values(compose_cfg("data=synthetic", f"data.path={path}"))
    with pytest.raises(ConfigError, match=f"^data.path = {path}: cannot be read: File name too long"):
        check_recipe(plain["data"], plain["lm"], plain["text"])
    with pytest.raises(DataError, match=f"^{path}: cannot be read: File name too long"):
        Cache(path)


def test_resume_lists_what_may_change_and_refuses_the_rest(compose_cfg) -> None:
    from sparsepilot.config.plain import plain_values

    was = plain_values(compose_cfg("run_dir=a"))
    changes = allowed_changes(
        was, plain_values(compose_cfg("run_dir=a", "logger=none", "samples=9_000_000", "accumulate=2"))
    )
    assert "samples: 2500000 -> 9000000" in [str(change) for change in changes]
    for refused in (
        "model.k=16",
        "batch=8192",
        "seed=1",
        "optimizer.lr=3e-5",
        "data.num_streams=32",
        "samples=1000000",
        "cross_entropy=spliced",
    ):
        with pytest.raises(ConfigError, match="another configuration") as error:
            allowed_changes(was, plain_values(compose_cfg("run_dir=a", refused)))
        assert refused.partition("=")[0] in str(error.value)
    measured = plain_values(compose_cfg("run_dir=a", "cross_entropy=spliced"))
    assert allowed_changes(
        measured, plain_values(compose_cfg("run_dir=a", "cross_entropy=spliced", "cross_entropy.kl=false"))
    )
    with pytest.raises(ConfigError, match=r"cross_entropy.tokens: 10000 -> 5"):
        allowed_changes(
            measured, plain_values(compose_cfg("run_dir=a", "cross_entropy=spliced", "cross_entropy.tokens=5"))
        )
    older = {
        field: value for field, value in was.items() if field != "cross_entropy"
    }  # of before there was such a thing
    assert allowed_changes(older, was) == []


def test_what_srun_says_of_its_tasks(compose_cfg, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of two tasks each, with CPUs of their own; and nodes of which one has more tasks than the other."""
    srun = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_NUM_NODES": "3",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        "SLURM_CPUS_PER_TASK": "8",
    }
    for name, value in srun.items():
        monkeypatch.setenv(name, value)
    multinode = ("data=synthetic", "data.num_streams=48", "batch=4800", "trainer=multinode", "trainer.accelerator=cpu")
    check(compose_cfg(*multinode))
    assert own_cpus() == 8
    with pytest.raises(ConfigError, match="64 equally; so many on each of 3 nodes can"):
        check(compose_cfg("data=synthetic", *multinode[3:]))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,2,1")
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE = 3,2,1: every node needs as many"):
        check(compose_cfg(*multinode))
    monkeypatch.setenv("RANK", "3")  # torchrun within that task: its ranks share what the task has
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert own_cpus() is None
