"""What a plan says of the rows that models are trained on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pare.methods.anatomy.apart import SEES_ACROSS
from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.plan import Plan, build_plan
from pare.workers.rows import PACKING, PREDICT
from pare.workers.tiny import tiny_tokenizer
from tests.methods.anatomy.tiny_models import tiny


def plan_of(*overrides: str) -> Plan:
    return build_plan(config.load(["recipe=lora", *overrides]), "cpu", 1)


def rows(plan: Plan) -> dict[str, Any]:
    return next(task.spec for task in plan.tasks.values() if task.type == "tokens" and task.spec["role"] == "train")


def test_how_documents_are_packed_belongs_to_the_rows_of_training_alone_and_the_default_is_not_said() -> None:
    plain, same, apart = (
        plan_of("model=tiny", *more) for more in ([], ["data.train.packing=concatenated"], ["data.train.packing=separate"])
    )

    assert set(plain.tasks) == set(same.tasks)
    assert rows(plain).keys() == {"role", "sequences", "length", "seed"}
    assert rows(apart) == {**rows(plain), "packing": "separate"}
    changed = [task for fp, task in apart.tasks.items() if fp not in plain.tasks]
    assert {task.type for task in changed} == {"tokens", "train", "score", "export", "evaluate", "speed"}
    assert [task.spec["role"] for task in changed if task.type == "tokens"] == ["train"]


def test_every_way_of_packing_is_a_setting_and_no_other() -> None:
    assert [rows(plan_of("model=tiny", f"data.train.packing={p}")).get("packing", PACKING[0]) for p in PACKING] == [*PACKING]
    with pytest.raises(ConfigError, match=r"data\.train\.packing must be concatenated, separate or padded, got 'apart'"):
        plan_of("model=tiny", "data.train.packing=apart")
    with pytest.raises(ConfigError, match=r"unknown setting 'data\.calibration\.packing'"):
        plan_of("model=tiny", "data.calibration.packing=separate")


@pytest.mark.parametrize("architecture", sorted(SEES_ACROSS))
def test_a_model_whose_documents_would_see_each_other_is_refused_by_the_plan(architecture: str, tmp_path: Path) -> None:
    tiny(architecture).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = ["model=hf", f"model.path={tmp_path}"]

    with pytest.raises(ConfigError, match=rf"{architecture} cannot keep .* apart: its .* Try: data.train.packing=padded"):
        plan_of(*model, "data.train.packing=separate")
    assert rows(plan_of(*model, "data.train.packing=padded"))["packing"] == "padded"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_rows_longer_than_the_model_has_positions_for_are_refused_by_the_plan(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    config = model.config
    most = config.max_position_embeddings
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    words = ["model=hf", f"model.path={tmp_path}", f"data.train.length={most}", "evaluation.windows.length=16"]

    assert rows(plan_of(*words))["length"] == most
    with pytest.raises(ConfigError, match=rf"data\.train\.length={most + 1} is more than the {most} tokens .*length={most}$"):
        plan_of(*words, f"data.train.length={most + 1}")
    with pytest.raises(ConfigError, match=rf"evaluation\.windows\.length={most + 1} is more than .*windows\.length={most}$"):
        plan_of(*words, f"evaluation.windows.length={most + 1}")
    with pytest.raises(ConfigError, match=rf"train\.length={most} behind 8 of a prompt is more .*length={most - 8}$"):
        plan_of(*words, "method@recipe.tune=prompt_tuning", "recipe.tune.virtual_tokens=8")


def test_what_the_assistant_says_is_learnt_of_conversations_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.predict must be all unless rows are conversations.* data.rows=chat"):
        plan_of("model=tiny", "data.train.predict=assistant")
    with pytest.raises(ConfigError, match=r"data\.train\.predict must be all or assistant, got 'user'"):
        plan_of("model=tiny", "data.train.predict=user")

    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    lines = [json.dumps({"messages": [*chat, {"role": "user", "content": f"{i}"}]}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    words = ["model=smollm2", "data=table", f"data.path={tmp_path / 'a.jsonl'}", "data.rows=chat"]
    assert PREDICT == ("all", "assistant")
    assert rows(plan_of(*words, "data.train.predict=assistant"))["predict"] == "assistant"
    assert "predict" not in rows(plan_of(*words))


def test_a_column_that_a_data_set_does_not_have_is_refused_by_the_plan_with_those_that_there_are(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "text", "stars": i}) for i in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))

    for source in (["data=hf"], ["data=table", "data.column=text"]):
        with pytest.raises(ConfigError, match=r"data\.column.*Its columns: body, stars"):
            plan_of("model=tiny", *source, f"data.path={tmp_path}")
    assert rows(plan_of("model=tiny", "data=hf", f"data.path={tmp_path}", "data.column=body"))
