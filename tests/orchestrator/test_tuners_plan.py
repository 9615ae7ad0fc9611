"""Tuners as the words of a command."""

from __future__ import annotations

import re

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from pare.methods.contract import load_all
from pare.methods.ops.tuner_kinds import KINDS, NOT_OFFERED
from pare.orchestrator.config import load
from pare.orchestrator.errors import ConfigError


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


@pytest.mark.parametrize("name", ["prefix_tuning", "loftq"])
def test_a_tuner_that_is_not_offered_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name} of peft is not offered: {NOT_OFFERED[name]}")):
        load(["model=tiny", "recipe=peft", f"method@recipe.tune={name}"])


def test_all_of_the_registry_of_peft_is_either_a_method_or_has_a_reason_why_not() -> None:
    known = {kind.type for kind in KINDS.values()} | {name.upper() for name in NOT_OFFERED}

    assert known - {"LOFTQ"} == {found.value for found in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert KINDS.keys() <= load_all().keys()
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
