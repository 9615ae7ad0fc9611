"""What evaluation adds to a plan: tasks of the user's, checked before anything starts, and a base that is measured once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.plan import Plan, build_plan

TINY = ["model=tiny", "evaluation.questions.n=4"]
YAML = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: options
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def plan_of(*overrides: str) -> Plan:
    recipe = [] if any(o.startswith("recipe=") for o in overrides) else ["recipe=base"]
    return build_plan(config.load([*TINY, *recipe, *overrides]), "cpu", 2)


def evaluation_of(plan: Plan, trial: str = "base") -> str:
    return plan.goals[trial].evaluate


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that the command is typed in, with a task, pairs and a metric."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(YAML)
    (tmp_path / "own" / "data.jsonl").write_text(json.dumps({"q": "a", "options": ["b", "c"], "label": 0}) + "\n")
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a"}\n')
    (tmp_path / "rhyme.py").write_text("def rhyme(model, tokenizer, windows):\n    return 1.0\n")
    return tmp_path


TASKS = ["evaluation.tasks=[mine]", "evaluation.include_path=own"]
RHYME = "evaluation.metrics=[{name: rhyme, function: 'rhyme.py:rhyme', direction: higher}]"


def test_what_is_not_asked_for_changes_no_fingerprint(folder: Path) -> None:
    plain = plan_of()

    assert set(plan_of("evaluation.include_path=own", "evaluation.limit=5", "evaluation.memory_gb=1").tasks) == set(plain.tasks)
    assert plain.tasks[evaluation_of(plain)].spec.keys() == {"dtype", "tolerance", "task"}


def test_a_task_of_ones_own_is_brought_into_the_store_once_and_asked_by_every_evaluation(folder: Path) -> None:
    plan = plan_of(*TASKS, "evaluation.num_fewshot=2", "evaluation.limit=5", "recipe=rtn", "recipe.quantize.bits=3,4")

    (benchmark,) = (t for t in plan.tasks.values() if t.type == "benchmark")
    evaluations = [t for t in plan.tasks.values() if t.type == "evaluate"]
    assert len(evaluations) == 2
    assert all(t.inputs["benchmark.mine"] == benchmark.fingerprint for t in evaluations)
    assert all((t.spec["num_fewshot"], t.spec["limit"]) == (2, 5) for t in evaluations)
    assert "lm-eval" in benchmark.record["libraries"]
    assert str(folder) not in json.dumps([t.record for t in plan.tasks.values()]), "no path enters a fingerprint"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("own/mine.yaml", "doc_to_text: q", "doc_to_text: '{{q}}?'"), ("own/data.jsonl", '"a"', '"A"'), ("rhyme.py", "1.0", "2.0"),
     ("pairs.jsonl", "b a", "b b")],
)  # fmt: skip
def test_a_change_of_what_is_asked_is_a_new_evaluation_and_no_new_model(folder: Path, file: str, old: str, new: str) -> None:
    overrides = [*TASKS, RHYME, "evaluation.pairs.path=pairs.jsonl"]
    first = plan_of(*overrides)
    again = plan_of(*overrides)
    (folder / file).write_text((folder / file).read_text().replace(old, new))
    changed = plan_of(*overrides)

    assert evaluation_of(first) == evaluation_of(again)
    assert evaluation_of(first) != evaluation_of(changed)
    assert first.goals["base"].export == changed.goals["base"].export
    assert first.goals["base"].score == changed.goals["base"].score


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation.tasks=[mien]", r"no task 'mien'.*Did you mean 'mine'"),
        ("evaluation.tasks=[mine,mine]", r"evaluation.tasks must be names that occur once"),
        ("evaluation.pairs.path=nowhere.jsonl", r"evaluation.pairs.path=nowhere.jsonl: no such file"),
        ("evaluation.pairs={path: pairs.jsonl, good: better}", r"has no column 'better', only sentence_good, sentence_bad"),
        ("evaluation.limit=0", r"evaluation.limit must be >= 1"),
        ("evaluation.num_fewshot=-1", r"evaluation.num_fewshot must be >= 0"),
        ("evaluation.memory_gb=0", r"evaluation.memory_gb must be > 0"),
        ("evaluation.metrics=[{name: rhyme, function: 'rhyme.py:rime', direction: higher}]", r"no function 'rime'"),
        ("evaluation.metrics=[{name: rhyme, function: 'rhyme.py:rhyme', direction: up}]", r"direction must be lower or higher"),
        ("evaluation.metrics=[{name: ppl, function: 'rhyme.py:rhyme', direction: lower}]", r"name must be none of ppl, kl"),
        (
            "evaluation.metrics=[{name: rhyme, function: rhyme, direction: lower}]",
            r"must be FILE.py:FUNCTION or MODULE",
        ),
        ("evaluation.metrics=[{name: rhyme, function: 'rhyme.py:rhyme'}]", r"direction"),
        ("evaluation.metrics=[{name: a, function: 'rhyme.py:rhyme', direction: lower, more: 1}]", r"more"),
        ("evaluation.taks=[mine]", r"unknown setting 'evaluation.taks'. Did you mean 'evaluation.tasks'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(folder: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_of("evaluation.include_path=own", override)


def test_the_base_is_measured_once_for_all_sweeps_on_the_same_model_data_and_evaluation() -> None:
    first = plan_of()
    base = {first.goals["base"].evaluate, first.goals["base"].speed, first.goals["base"].score}

    for others in (
        ["recipe=base,gptq", "recipe.quantize.bits=2,3"],
        [
            "name=another",
            "seed=7",
            "dtype=bfloat16",
            "engine.ranks=2",
            "cluster.slots=1",
            "store.keep=exports",
            "budget.trials=9",
        ],
        ["data.calibration.sequences=3", "data.train.length=64", "data.selection.sequences=2", "data.validation.length=32"],
        ["recipe=base,lora,soup"],
    ):
        assert base <= set(plan_of(*others).tasks), others

    for others in (["evaluation.windows.length=64"], ["data.seed=1"], ["model.tiny.steps=7"], ["evaluation.dtype=bfloat16"]):
        assert first.goals["base"].evaluate not in plan_of(*others).tasks, others
