"""What a controller cannot do, it says in one line before training starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from plants import BATCH, penalty

from sparsepilot.controllers.l0_target import L0Target
from sparsepilot.controllers.pareto import Pareto
from sparsepilot.errors import ConfigError

PENALTY, FVU = ("model=relu",), ("controller=constrained", "controller.quality=fvu", "controller.target=0.1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("controller=constrained", "controller.quality=fvu", "controller.target=1.5"),
            "controller.target = 1.5: an fvu lies below 1, which no latent at all gives",
        ),
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
        *[
            (("controller=l0_target", words), "an L0 of 2.5 is wanted; this model has a whole number of latents in")
            for words in ("controller.target_l0=2.5", "controller.trajectory=[[0,9.3],[1,2.5]]")
        ],
        (("controller=pareto", "controller.targets=[8,2.5,2]"), "controller.targets: an L0 of 2.5 is wanted"),
        (
            ("controller=l0_target", "controller.target_l0=8", "controller.initial_strength=1"),
            "controller.initial_strength = 1: is a penalty's; this model's knob is k",
        ),
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
            ("model=jumprelu", "controller=pareto", "controller.targets=[32,8,4]"),
            "controller.targets: L0 is to fall by 0.52 nats per step between 0.333333 and 0.466667 of the budget; ",
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
        (
            ("controller=ramp", "controller.wait_samples=9000", "controller.ramp_samples=100"),
            "controller.wait_samples = 9000: the ramp would begin after the end of the run's 5,120 samples",
        ),
        (("controller=ramp", "controller.end=65"), "controller.end = 65: this model's k lies between 1 and 64"),
        (("controller=ramp", "controller.start=65"), "controller.start = 65: this model's k is at most 64"),
        *[
            (words, "an L0 of 2.5 is wanted; this model has a whole number of latents in each row: 2 or 3")
            for words in (("controller.strength=2.5",), ("controller=ramp", "controller.end=2.5"))
        ],
        (
            ("controller=ramp", "controller.begin=1", "controller.ramp_samples=100"),
            "controller.begin = 1: the ramp would begin after the end",
        ),
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


def test_a_default_trajectory_that_will_be_late_is_said() -> None:
    """Where it begins is known once the run has begun, so it is no error."""
    soon, late = (
        penalty(0.1, num_steps)._replace(slew=lambda samples: 0.026 / BATCH)  # narrow JumpReLU, learning rate 1e-3
        for num_steps in (1700, 1500)
    )
    controller = L0Target(target_l0=32, reach=0.1)  # from 2,048 of 4,096 latents: 4.16 nats, 160 steps; a tenth for it
    controller.bind(soon)
    assert controller.notes() == []
    controller.bind(late)
    (note,) = controller.notes()
    assert note.startswith(
        "controller.reach = 0.1: from 2,048 latents, where runs about start, to 32 takes some 160 steps"
    )
    assert "until there are 150: give more samples or a smaller batch" in note
    controller.bind(late._replace(kind="k", low=1.0))  # a k is set
    assert controller.notes() == []


def test_a_run_too_short_to_settle_in_is_said_with_a_batch_that_would_do() -> None:
    controller = L0Target(target_l0=32)
    controller.bind(penalty(0.1, 1500))
    assert controller.notes() == []
    short = penalty(0.1, 600)
    controller.bind(short)
    (note,) = controller.notes()
    assert "reached 480 steps before the end, and to rest there it may take 1,200" in note
    assert note.endswith("a smaller batch (102 at most)")
    controller.bind(short._replace(batch=102))
    assert controller.notes() == []


def test_a_given_trajectory_that_the_loop_cannot_follow_is_said() -> None:
    """The reference: 3.7 nats in its first eighth; and one that begins where no run does, at 8 of 4,096 latents."""
    reference = L0Target(trajectory=[[0.0, 2000.0], [0.125, 50.0], [0.5, 20.0], [1.0, 4.0]])
    reference.bind(penalty(32.0, 3000))
    assert reference.notes() == []
    reference.bind(penalty(32.0, 2900, kind="k", low=1.0))  # a k is set
    assert reference.notes() == []
    reference.bind(penalty(32.0, 2900))
    (note,) = reference.notes()
    assert "from 2,000 at 0 of the budget to 50 at 0.125; that takes some 369 steps, and there are 362" in note
    sudden = L0Target(trajectory=[[0.0, 8.0], [1.0, 8.0]])
    sudden.bind(penalty(0.1, 3000))
    (note,) = sudden.notes()
    assert "from 2,048 at 0 of the budget to 8 at 0; that takes some 555 steps, and there are 0: it will be" in note


def test_pareto_says_where_its_values_have_too_few_steps_to_settle() -> None:
    controller = Pareto(targets=[128, 32])
    for num_steps, said in ((700, False), (600, True)):  # 0.6 of a half, and 200 steps are needed
        controller.bind(penalty(0.1, num_steps))
        assert [note.startswith("controller.targets: each is held for 180 steps") for note in controller.notes()] == [
            True
        ] * said


def test_check_says_what_a_controller_has_to_say(train_tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny("model=jumprelu", "controller=l0_target", "controller.target_l0=8", "check=true")
    assert "controller.reach = 0.2: from 32 latents" in " ".join(capsys.readouterr().out.split())
