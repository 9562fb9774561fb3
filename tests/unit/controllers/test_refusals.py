"""What a controller cannot do, it says in one line before training starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepilot.errors import ConfigError

PENALTY, FVU = ("model=relu",), ("controller=constrained", "controller.quality=fvu", "controller.target=0.1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("controller=l0_target", "controller.target_l0=65"),
            "controller.target_l0: an L0 of 65 is wanted; there are model.d_sae = 64 latents",
        ),
        (
            ("controller=pareto", "controller.targets=[65,3]"),
            "controller.targets: an L0 of 65 is wanted; there are model.d_sae = 64 latents",
        ),
        (("controller=l0_target", "controller.target_l0=0.5"), "0.5"),  # topk gives one latent at least
        (("controller=pareto", "controller.targets=[8,0.5]"), "0.5"),
        (("controller=l0_target", "controller.target_l0=-3"), "controller.target_l0 = -3: should be greater than 0"),
        (
            ("controller=l0_target", "controller.target_l0=8", "controller.trajectory=reference"),
            "controller.target_l0 = 8: controller.trajectory says where the run ends; give one of them",
        ),
        (("controller=l0_target", "controller.trajectory=reference"), "controller.trajectory: L0 8000 at 0"),
        (
            ("controller=l0_target", "controller.trajectory=[[0.5,8],[0.2,16]]"),
            "controller.trajectory = [[0.5, 8], [0.2, 16]]: shares of the budget must ascend within 0 to 1",
        ),
        (("controller=l0_target", "controller.trajectory=[[0.1,8],[0.1,4]]"), "must ascend within 0 to 1"),
        (("controller=l0_target", "controller.trajectory=[[0,8],[1.5,4]]"), "must ascend within 0 to 1"),
        (("controller=l0_target", "controller.trajectory=[[0,8,1]]"), "pairs [share of the budget, L0] are needed"),
        (("controller=l0_target", "controller.trajectory=[]"), "pairs [share of the budget, L0] are needed"),
        (("controller=l0_target", "controller.trajectory=rreference"), "controller.trajectory"),
        *[
            (
                (f"model={model}", "controller=l0_target", "controller.trajectory=[[0,60],[0.01,1]]"),
                "controller.trajectory: L0 is to fall by 20 nats per step between 0 and 0.01 of the budget; ",
            )
            for model in ("relu", "jumprelu")
        ],
        (("controller=l0_target", "controller.reach=0"), "controller.reach = 0: should be greater than 0"),
        (
            (*PENALTY, "controller=l0_target", "controller.initial_strength=1e7"),
            "controller.initial_strength = 1e+07: should lie between 1e-06 and 1e+06",
        ),
        (
            (*PENALTY, "controller=l0_target", "controller.initial_strength=1e-7"),
            "controller.initial_strength = 1e-07: should lie between 1e-06 and 1e+06",
        ),
        *[
            (
                ("model=jumprelu", "model.target_l0=8", *controller),
                "model.target_l0 = 8: the loss holds that L0 by itself; use controller=constant",
            )
            for controller in (("controller=l0_target",), FVU, ("controller=pareto", "controller.targets=[8,4]"))
        ],
        (
            ("model=topk", "model.k=4", "model.anneal_k_from=16", "controller=l0_target"),
            "model.anneal_k_from = 16: k falls from it by itself in training; use controller=constant",
        ),
        (
            # a later fall than the steepest, where the learning rate has nearly gone
            (
                *("model=relu", "optimizer.lr=2e-3", "schedule=warmup_stable_decay", "samples=102400"),
                *("controller=l0_target", "controller.trajectory=[[0,60],[0.1,40],[0.97,40],[1,20]]"),
            ),
            "controller.trajectory: L0 is to fall by 0.058 nats per step between 0.97 and 1 of the budget; ",
        ),
        (
            ("controller=pareto", "controller.targets=[8,4]", "data.build.num_val_rows=0"),
            "controller = pareto: goes from value to value at validations, and this data has no validation rows",
        ),
        (("callbacks.disturb={at: 1.5}", "controller=l0_target"), "callbacks.disturb.at = 1.5: should be less than 1"),
        ((*PENALTY, "controller=l0_target", "model.coefficient=0"), "model.coefficient = 0: should lie between"),
        (
            ("controller=l0_target", "controller.lowest=2", "controller.highest=1"),
            "controller.lowest = 2: must lie below controller.highest = 1",
        ),
        (("controller=l0_target", "controller.proportional=-1"), "controller.proportional = -1: should be greater"),
        (("controller=l0_target", "+controller.target=8"), "controller.target = 8: there is no such field"),
        (
            ("controller=pareto", "controller.targets=[8,16]"),
            "controller.targets = [8, 16]: two or more descending L0 values are needed",
        ),
        (("controller=pareto", "controller.targets=[8,8]"), "two or more descending L0 values are needed"),
        (("controller=pareto", "controller.targets=[8]"), "two or more descending L0 values are needed"),
        (("controller=pareto", "controller.targets=[8,-1]"), "controller.targets"),
        *[
            (
                ("controller=constrained", f"controller.quality={quality}", "controller.target=0.2"),
                f"controller.quality = {quality}: is not measured; set cross_entropy=spliced",
            )
            for quality in ("ce", "ce_increase", "ce_gap")
        ],
        (("controller=constrained", "controller.quality=loss"), "controller.quality = 'loss': should be 'fvu', 'ce'"),
        (
            ("controller=constrained", "controller.quality=ce_gap", "cross_entropy=spliced"),
            "controller.target = null: quality=ce_gap has no default",
        ),
        ((*FVU, "controller.target=-1"), "controller.target = -1: should be greater than 0"),
        ((*FVU, "controller.climb=2"), "controller.recover = 1.2: at least controller.climb = 2 is needed"),
        ((*FVU, "controller.wait=1"), "controller.wait = 1: should be less than 1"),
        (
            ("controller=ramp", "controller.begin=0.5"),
            "controller.begin = 0.5: must lie before controller.until = 0.25",
        ),
        (("controller=ramp", "controller.shape=log"), "controller.start = 0: a ramp of shape=log must start above 0"),
        (("controller=ramp", "controller.shape=sine"), "controller.shape = 'sine'"),
        (("controller=ramp", "controller.wait_samples=4000"), "controller.wait_samples = 4000: the ramp would begin"),
        (("controller=ramp", "controller.end=65"), "controller.end = 65: this model's k lies between 1 and 64"),
        (("controller=ramp", "controller.start=65"), "controller.start = 65: this model's k is at most 64"),
        (("controller.strength=65",), "controller.strength = 65: this model's k lies between 1 and 64"),
    ],
)
def test_a_bad_value_is_one_clear_line_before_training(
    train_tiny, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        train_tiny(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert any(field in str(error.value) for field in ("controller", "model.coefficient", "callbacks.disturb"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
