"""Teachers in a plan: who is one, what students share, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.estimate import Estimator, History
from pare.orchestrator.housekeeping import KnownTask
from pare.orchestrator.machine import Machine
from pare.orchestrator.plan import Plan, Task, build_plan
from pare.workers.tiny import TinySettings, tiny_config, tiny_tokenizer

TINY = ["model=tiny", "evaluation.questions.n=0", "evaluation.speed.repeats=0"]
HEALED = "recipe=sparsegpt_distill"


@functools.cache
def plan_of(*overrides: str) -> Plan:
    """One plan for all tests that ask for the same and change nothing in it."""
    return build_plan(config.load([*TINY, *overrides]), "cpu", 2)


def of_type(plan: Plan, kind: str) -> list[Task]:
    return [task for task in plan.tasks.values() if task.type == kind]


def test_the_base_is_the_teacher_unless_another_is_named_and_all_students_share_what_it_makes_of_the_data() -> None:
    plan = plan_of(
        "recipe=sparsegpt_distill,gptq_distill", "recipe.heal.learning_rate=1e-4,1e-5", "recipe.prune.sparsity=0.5,0.6"
    )

    (teach,) = of_type(plan, "teach")
    (imported,) = of_type(plan, "import_model")
    students = of_type(plan, "train")
    assert teach.inputs["model"] == imported.fingerprint
    assert len(students) == 2 * 2 + 2
    assert {student.inputs["teacher.0"] for student in students} == {teach.fingerprint}
    assert {student.inputs["tokens"] for student in students} == {teach.inputs["tokens"]}
    assert all(student.spec["teachers"] == [1.0] for student in students)


def test_an_earlier_stage_can_teach_and_its_name_changes_nothing(tmp_path: Path) -> None:
    for first in ("tune", "correct"):
        (tmp_path / "recipe").mkdir(exist_ok=True)
        stages = f"[/method@{first}: full, /method@prune: wanda, /method@heal: distill]"
        (tmp_path / "recipe" / f"by_{first}.yaml").write_text(
            f"defaults: {stages}\nheal:\n  teachers: {{{first}: 3, model: 1}}\n"
        )
    plans = [
        build_plan(config.load([*TINY, f"recipe=by_{first}"], config_dir=str(tmp_path)), "cpu", 2)
        for first in ("tune", "correct")
    ]

    plan, other = plans
    full, distill = of_type(plan, "train")
    assert [task.spec["method"] for task in (full, distill)] == ["full", "distill"]
    teachers = [plan.tasks[distill.inputs[f"teacher.{i}"]] for i in (0, 1)]
    assert [task.inputs["model"] for task in teachers] == [full.fingerprint, full.inputs["model"]]
    assert distill.spec["teachers"] == [3.0, 1.0]
    assert [t.fingerprint for t in of_type(other, "train")] == [full.fingerprint, distill.fingerprint]
    (card,) = [task.spec["card"] for task in of_type(plan, "export")]
    assert card["settings"]["heal"]["teachers"] == {"tune": 3.0, "model": 1.0}
    assert "recipe.heal.teachers={tune:3,model:1}" in card["command"]


def test_teachers_named_on_the_command_line_are_those_of_a_file() -> None:
    plan = plan_of(HEALED, "recipe.heal.teachers={prune:1,model:0.5}")

    (distill,) = of_type(plan, "train")
    assert plan.tasks[distill.inputs["teacher.0"]].inputs["model"] == distill.inputs["model"]
    assert distill.spec["teachers"] == [1.0, 0.5]
    assert set(plan_of(HEALED, "recipe.heal.teachers={model:1}").tasks) == set(plan_of(HEALED).tasks)


def larger_model(directory: Path, vocabulary: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = tiny_config(TinySettings(layers=1, width=64, ffn=64))
    LlamaForCausalLM(LlamaConfig(**settings | ({"vocab_size": vocabulary} if vocabulary else {}))).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_another_model_can_teach_and_where_it_lies_changes_nothing(tmp_path: Path) -> None:
    one, two = larger_model(tmp_path / "one"), tmp_path / "two"
    one.rename(two)
    (tmp_path / "two").rename(one)
    plan = plan_of(HEALED, f"recipe.heal.teachers={{{one}:1,model:1}}")
    one.rename(two)
    moved = plan_of(HEALED, f"recipe.heal.teachers={{{two}:1,model:1}}")

    imported = {task.fingerprint for task in of_type(plan, "import_model")}
    assert {task.inputs["model"] for task in of_type(plan, "teach")} == imported
    assert len(imported) == 2
    assert set(plan.tasks) == set(moved.tasks)
    assert str(tmp_path) not in json.dumps([task.record for task in plan.tasks.values()])


def test_a_teacher_of_another_vocabulary_is_refused_while_planning(tmp_path: Path) -> None:
    larger_model(tmp_path / "other", vocabulary=300)

    with pytest.raises(
        ConfigError, match=r"recipe\.heal\.teachers: .*other' has a vocabulary of 300 tokens, the student one of 2"
    ):
        plan_of(HEALED, f"recipe.heal.teachers={{{tmp_path / 'other'}:1}}")


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ("{prun:1}", r"recipe\.heal\.teachers: 'prun' is no model .*Did you mean 'prune'\? It can learn from model, prune,"),
        ("{heal:1}", r"recipe\.heal\.teachers: 'heal' comes later, and is no model"),
        ("{model:0}", r"recipe\.heal\.teachers\.model must be > 0 and finite, got 0\.0"),
        ("{model:much}", r"recipe\.heal\.teachers.*'much'.*Float"),
    ],
)
def test_a_teacher_that_means_no_model_is_refused_with_those_that_do(teachers: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(HEALED, f"recipe.heal.teachers={teachers}")


@pytest.mark.parametrize(("codes", "allowed"), [("gptq", "tune.parameters=norm"), ("awq", "quantize.scale_only=true"),
                                                ("qlora", "tune={decode: true, store: bfloat16}")])  # fmt: skip
def test_full_tuning_of_codes_is_refused_while_planning_unless_it_is_asked_for(
    codes: str, allowed: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "after.yaml").write_text(f"defaults: [/method@quantize: {codes}, /method@tune: full]\n")

    def plan(*overrides: str) -> Plan:
        return build_plan(config.load([*TINY, "recipe=after", *overrides], config_dir=str(tmp_path)), "cpu", 2)

    with pytest.raises(ConfigError, match=rf"recipe\.tune\.decode must be true .* made codes by recipe\.quantize \({codes}\)"):
        plan()
    assert of_type(plan(f"recipe.{allowed}"), "train")


def test_only_a_method_that_learns_from_teachers_has_any() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'recipe\.tune\.teachers'"):
        plan_of("recipe=lora", "recipe.tune.teachers={model:1}")


def test_a_student_cannot_be_spread_by_zero_3_and_full_tuning_can() -> None:
    assert of_type(plan_of("recipe=full", "engine=deepspeed_zero3"), "train")
    assert of_type(plan_of(HEALED, "engine=deepspeed_zero2"), "train")
    with pytest.raises(ConfigError, match=r"distill \(recipe\.heal\) cannot be trained by ZeRO-3.*Try: engine=deepspeed_zero2"):
        plan_of(HEALED, "engine=deepspeed_zero3")


def test_what_a_teacher_made_goes_once_no_student_needs_it_and_what_it_is_made_of_stays_readable() -> None:
    student = KnownTask("train", "", True, 1.0, {"model": "m", "tokens": "t", "teacher.0": "a", "teacher.1": "b"})
    teacher = KnownTask("teach", "", True, 1.0, {"model": "m", "tokens": "t"})

    assert student.stands_on == ["m"]
    assert teacher.stands_on == ["m"], "its head lies there"


SPEED = Machine(float32=1e11, bfloat16=2e11, bandwidth=3e10)


def estimates(plan: Plan, kind: str) -> list[tuple[float, float, float]]:
    found = [Estimator(plan, History({}, {}), "cpu", 2, SPEED).estimate(task) for task in of_type(plan, kind)]
    return [(e.wall_s, e.peak_bytes, e.disk_bytes) for e in found]


def test_teaching_is_estimated_by_its_windows_and_logits_by_the_piece() -> None:
    small, large = (estimates(plan_of(HEALED, f"data.train.sequences={n}"), "teach")[0] for n in (64, 128))
    pieces, wide = (estimates(plan_of(HEALED, f"recipe.heal.chunk={n}"), "train")[0] for n in (512, 8192))

    assert small[2] == 64 * 512 * 128 * 4
    assert large[2] == 2 * small[2]
    assert large[0] > small[0]
    assert wide[1] - pieces[1] == pytest.approx((8192 - 512) * 258 * 4 * 5, rel=0.05)
    assert wide[0] == pieces[0]


def test_full_tuning_is_estimated_by_what_is_trained() -> None:
    every, norms = (estimates(plan_of("recipe=full", f"recipe.tune.parameters={what}"), "train")[0] for what in ("all", "norm"))
    sparse = estimates(plan_of(HEALED), "train")[0]

    assert every[1] > norms[1]
    assert every[2] > sparse[2] > norms[2]
