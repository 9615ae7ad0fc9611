"""Tuners as the words of a command."""

from __future__ import annotations

import re

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from pare.methods.contract import load_all
from pare.methods.ops.tuner_kinds import KINDS, NOT_OFFERED, PROMPTS
from pare.orchestrator.config import load
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.work import Job, Made, Shape, made_by


def test_one_command_sweeps_tuners_and_a_setting_goes_to_those_that_have_it() -> None:
    names = ["lora", "ia3", "vera"]

    trials = load(["model=tiny", "recipe=peft", f"method@recipe.tune={','.join(names)}", "recipe.tune.rank=4"]).trials

    assert [trial.stages[0].method for trial in trials] == names
    settings = {trial.stages[0].method: trial.stages[0].settings for trial in trials}
    assert [getattr(found, "rank", None) for found in settings.values()] == [4, None, 4]
    assert settings["ia3"].learning_rate == 10 * settings["lora"].learning_rate  # type: ignore[attr-defined]


def test_a_key_of_the_tuners_own_is_swept_like_any_setting() -> None:
    words = ["model=tiny", "recipe=peft", "method@recipe.tune=oft", "+recipe.tune.config.oft_block_size=8,16"]

    trials = load(words).trials

    assert [trial.stages[0].settings.config for trial in trials] == [{"oft_block_size": 8}, {"oft_block_size": 16}]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["cartridge", "loftq"])
def test_a_tuner_that_is_not_offered_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name} of peft is not offered: {NOT_OFFERED[name]}")):
        load(["model=tiny", "recipe=peft", f"method@recipe.tune={name}"])


def test_all_of_the_registry_of_peft_is_either_a_method_or_has_a_reason_why_not() -> None:
    known = {kind.type for kind in (KINDS | PROMPTS).values()} | {name.upper() for name in NOT_OFFERED}

    assert known - {"LOFTQ"} == {found.value for found in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert (KINDS | PROMPTS).keys() <= load_all().keys()
    assert not NOT_OFFERED.keys() & load_all().keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+recipe.tune.config.oft_blok_size=8"], r"recipe\.tune\.config must be made of keys of .*got 'oft_blok_size'\.$"),
        (["recipe.tune.targets=q-v"], r"recipe\.tune\.targets must be .*Try: recipe\.tune\.targets=all-linear$"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_before_anything_runs(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(["model=tiny", "recipe=peft", "method@recipe.tune=oft", *words])
    assert re.search(message, str(error.value)), str(error.value)


PROMPT = ["model=tiny", "recipe=peft", "method@recipe.tune=prefix_tuning"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+method@recipe.after=rtn"], r"recipe\.tune: a prompt is learnt against the model as it is: make it the last"),
        (["+method@recipe.after=prompt_tuning"], r"make it the last stage, behind 'after'$"),
        (["data.train.packing=separate"], r"only the first would see the prompt of prefix_tuning\. Try: data\.train\.p"),
        (["export.format=gguf"], r"export\.format=gguf: a prompt ships as an adapter .* Try: export\.format=auto$"),
    ],
)  # fmt: skip
def test_what_cannot_honour_a_prompt_is_refused_before_anything_runs(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([*PROMPT, *words])
    assert re.search(message, str(error.value)), str(error.value)


def test_a_prompt_is_no_member_of_a_merge() -> None:
    words = ["model=tiny", "recipe=peft,soup", "method@recipe.tune=lora,p_tuning", "recipe.merge.members.blocks=[peft]"]

    with pytest.raises(ConfigError, match=r"blocks: 'peft.*p_tuning' learns a prompt, which is no weight and cannot be merged"):
        load(words)


def test_a_prompt_may_stand_behind_any_stage_and_be_shipped_as_an_adapter() -> None:
    words = ["model=tiny", "recipe=rtn", "+method@recipe.tune=prompt_tuning,p_tuning", "data.train.packing=padded"]

    trials = load([*words, "export.format=adapter", "recipe.tune.virtual_tokens=8"]).trials

    assert [[stage.method for stage in trial.stages] for trial in trials] == [["rtn", "prompt_tuning"], ["rtn", "p_tuning"]]


@pytest.mark.parametrize(("name", "numbers"), [("prompt_tuning", 10 * 64), ("prefix_tuning", 2 * 2 * 10 * 64)])
def test_the_bytes_of_a_prompt_are_estimated_from_its_length(name: str, numbers: int) -> None:
    load_all()
    record = {"type": "train", "spec": {"method": name, "settings": {"virtual_tokens": 10, "init_seed": 0}}, "inputs": {}}

    found = made_by(Job(record, Shape(parameters=10**6, linears=8 * 10**5, width=64, blocks=2)))

    assert found == Made(2 * 4.0 * numbers, adapter=True)  # as operands, and in the adapter's own file
