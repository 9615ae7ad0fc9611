"""`engine=deepspeed_zero*`: what becomes of it in the plan, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from pare.methods.finetune.full import Full
from pare.orchestrator import config, zero_config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.plan import Plan, build_plan
from pare.orchestrator.schema import Engine

TINY = ["model=tiny", "evaluation.questions.n=4", "recipe=full", "recipe.tune.batch_size=4", "recipe.tune.micro_batch_size=2"]


def plan_of(*overrides: str) -> Plan:
    return build_plan(config.load([*TINY, *overrides]), "cpu", 2)


def spec_of(*overrides: str) -> dict[str, Any]:
    (task,) = [task for task in plan_of(*overrides).tasks.values() if task.type == "train"]
    return task.spec


def test_one_word_chooses_the_engine_and_only_training_knows_of_it() -> None:
    plan = plan_of("engine=torch,deepspeed_zero1,deepspeed_zero2,deepspeed_zero3,deepspeed_zero3_offload")

    found = [task.spec.get("zero") for task in plan.tasks.values() if task.type == "train"]
    chosen = [(1, False), (2, False), (3, False), (3, True)]
    assert found == [None, *({"stage": stage, "offload": offload, "config": {}} for stage, offload in chosen)]
    per_trial = {task.type for task in plan.tasks.values() if len(task.trials) == 1}
    assert per_trial == {"train", "score", "export", "evaluate", "speed"}, "training, and what reads its result"


def test_keys_of_deepspeed_are_taken_and_those_that_say_what_the_recipe_says_are_left_to_it() -> None:
    given = [
        "engine.config.zero_optimization.reduce_bucket_size=1e6",
        "engine.config.zero_optimization.stage=2",
        "engine.config.wall_clock_breakdown=true",
        "engine.config.train_batch_size=4",
        "engine.config.train_micro_batch_size_per_gpu=auto",
        "engine.config.gradient_accumulation_steps=1",
        "engine.config.gradient_clipping=1.0",
        "engine.config.bf16={enabled: true}",
        "engine.config.fp16={enabled: false}",
    ]

    spec = spec_of("engine=deepspeed_zero2", "engine.ranks=2", "dtype=bfloat16", *given)

    assert spec["zero"]["config"] == {
        "zero_optimization": {"reduce_bucket_size": 1e6, "stage": 2},
        "wall_clock_breakdown": True,
    }
    assert spec["ranks"] == 2


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"zero_optimisation": {}}, r"unknown setting 'engine\.config\.zero_optimisation'.*'zero_optimization'"),
        ({"zero_optimization": {"reduce_bucket": 1}}, r"zero_optimization\.reduce_bucket'\. Did you mean 'reduce_bucket_size"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, r"reduce_bucket_size must be of type int, got 'big'"),
        ({"zero_optimization": {"overlap_comm": 1}}, r"overlap_comm must be of type bool, got 1"),
        ({"zero_optimization": [1]}, r"zero_optimization must be of type dict"),
        ({"zero_optimization": {"offload_param": "auto"}}, r"offload_param must be of type dict"),
        ({"zero_optimization": {"stage": 3}}, r"stage=3 contradicts engine\.stage=2\. Try: engine=deepspeed_zero3"),
        ({"zero_optimization": {"stage": 7}}, r"Try: engine=deepspeed_zero1, 2 or 3, and leave the key out"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"contradicts engine\.offload=false .*zero3_offload"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"nvme: what lies there would be in no checkpoint"),
        ({"train_batch_size": 8}, r"contradicts the recipe, by which it is 4 .*Try: recipe\.tune\.batch_size=8"),
        ({"train_micro_batch_size_per_gpu": 1}, r"by which it is 2 .*Try: recipe\.tune\.micro_batch_size=1"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps=4 contradicts the recipe, by which it is 2"),
        ({"gradient_clipping": 0.5}, r"by which it is 1\.0 .*Try: recipe\.tune\.max_grad_norm=0\.5"),
        ({"optimizer": {"type": "AdamW"}}, r"engine\.config\.optimizer: .*Try: recipe\.STAGE\.optimizer=adamw_torch"),
        ({"scheduler": {"type": "WarmupLR"}}, r"engine\.config\.scheduler: .*recipe\.STAGE\.schedule"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled contradicts dtype=float32.*Try: dtype=bfloat16"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled contradicts dtype=float32"),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast\.enabled=True contradicts dtype=float32"),
    ],
)
def test_a_config_that_is_wrong_or_says_something_else_is_refused(given: dict[str, Any], refused: str) -> None:
    method = Full(batch_size=4, micro_batch_size=2)

    with pytest.raises(ConfigError, match=refused):
        zero_config.own_config(Engine("deepspeed", stage=2, config=given).config, "tune", method, 1, "float32")


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (
            "zero_optimization.overlap_com=true",
            r"engine\.config\.zero_optimization\.overlap_com'\. Did you mean 'overlap_comm'",
        ),
        ("train_batch_size=8", r"train_batch_size=8 contradicts the recipe, by which it is 4"),
    ],
)
def test_a_wrong_config_is_refused_when_it_is_planned(given: str, refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        plan_of("engine=deepspeed_zero2", f"engine.config.{given}")


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("engine.config.zero_optimization.stage=2", r"engine\.config must be left out for engine=torch"),
        ("engine.kind=fsdp", r"engine\.kind must be torch or deepspeed, got 'fsdp'"),
        ("engine=deepspeed_zero4", r"unknown engine 'deepspeed_zero4'.*Did you mean 'deepspeed_zero"),
    ],
)
def test_an_engine_that_does_not_exist_is_refused(given: str, refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        plan_of(given)


@pytest.mark.parametrize(("shards", "other"), [("data", "deepspeed_zero2"), ("none", "torch")])
def test_zero_3_is_refused_to_a_method_that_works_on_whole_weights(
    monkeypatch: pytest.MonkeyPatch, shards: str, other: str
) -> None:
    monkeypatch.setattr(Full, "shards", shards)

    refused = rf"engine\.stage=3: full \(recipe\.tune\) cannot be trained by ZeRO-3: it .*\. Try: engine={other}$"
    with pytest.raises(ConfigError, match=refused):
        plan_of("engine=deepspeed_zero3")


def test_a_method_for_one_rank_is_refused_several_and_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Full, "shards", "none")

    with pytest.raises(ConfigError, match=r"engine\.ranks=2: full trains on one rank only\. Try: engine\.ranks=1"):
        plan_of("engine.ranks=2")
    with pytest.raises(ConfigError, match=r"cannot be trained by ZeRO-1: it is made for one rank .*Try: engine=torch"):
        plan_of("engine=deepspeed_zero1")


def test_a_method_that_works_on_gradients_is_refused_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Full, "after_backward", lambda self, step: None)

    with pytest.raises(ConfigError, match=r"cannot be trained by ZeRO-2: it works on the gradients .*Try: engine=torch"):
        plan_of("engine=deepspeed_zero2")


def test_every_key_that_is_taken_is_one_of_the_installed_deepspeed() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    known = {field.alias or name for name, field in zero.DeepSpeedZeroConfig.model_fields.items()}

    assert set(zero_config.ZERO_KEYS) <= known
