"""The plan: what trials share, and what they do not."""

import pytest

from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.plan import Plan, build_plan
from pare.workers.store import Store

TINY = ["model=tiny", "evaluation.questions.n=4"]


def plan_of(*overrides: str) -> Plan:
    return build_plan(config.load([*TINY, *overrides]), "cpu", 2)


def count(plan: Plan, kind: str) -> int:
    return sum(task.type == kind for task in plan.tasks.values())


def test_bit_widths_share_import_corpus_calibration_and_the_score_of_the_base() -> None:
    plan = plan_of("recipe=gptq", "recipe.quantize.bits=2,3,4")

    assert [count(plan, kind) for kind in ("import_model", "corpus", "calibrate", "questions")] == [1, 1, 1, 1]
    assert [count(plan, kind) for kind in ("compress", "export", "evaluate", "speed")] == [3, 3, 3, 3]
    assert count(plan, "score") == 4, "three trials and the base"
    assert plan.total_if_separate > len(plan.tasks)


def test_statistics_over_compressed_inputs_belong_to_one_task() -> None:
    plan = plan_of("recipe=gptq", "recipe.quantize.bits=3,4", "recipe.quantize.inputs=compressed")

    assert count(plan, "calibrate") == 0
    assert all("tokens" in task.inputs for task in plan.tasks.values() if task.type == "compress")


def test_the_same_trial_typed_in_another_way_is_the_same_work() -> None:
    short = plan_of("recipe=gptq", "recipe.quantize.bits=3")
    long = plan_of("recipe=gptq", "recipe.quantize.group_size=64", "recipe.quantize.bits=3", "name=other")

    assert set(short.tasks) == set(long.tasks)


def test_a_seed_counts_only_where_random_numbers_are_drawn() -> None:
    gptq = [
        {t.fingerprint for t in plan_of("recipe=gptq", f"seed={seed}").tasks.values() if t.type == "compress"}
        for seed in (0, 1)
    ]
    lora = [
        {t.fingerprint for t in plan_of("recipe=lora", f"seed={seed}").tasks.values() if t.type == "train"} for seed in (0, 1)
    ]

    assert gptq[0] == gptq[1]
    assert set(plan_of("recipe=gptq", "seed=1").tasks) == set(plan_of("recipe=gptq").tasks)
    assert lora[0].isdisjoint(lora[1])


def test_ranks_belong_to_training_alone_and_one_of_them_changes_nothing() -> None:
    batch = "recipe.tune.batch_size=4"
    plain, one, two = (plan_of("recipe=lora", batch, *more) for more in ([], ["engine.ranks=1"], ["engine.ranks=2"]))

    assert set(plain.tasks) == set(one.tasks)
    changed = {task.type for fp, task in two.tasks.items() if fp not in one.tasks}
    assert changed == {"train", "score", "export", "evaluate", "speed"}, "training, and what reads its result"
    assert [task.spec["ranks"] for task in two.tasks.values() if task.type == "train"] == [2]
    assert set(plan_of("recipe=gptq", "engine.ranks=2").tasks) == set(plan_of("recipe=gptq").tasks)


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size must be a multiple of engine\.ranks=3, got 4\. Try: .*batch_size=3"):
        plan_of("recipe=lora", "recipe.tune.batch_size=4", "engine.ranks=3")
    with pytest.raises(ConfigError, match=r"engine\.ranks must be >= 1, got 0"):
        plan_of("recipe=lora", "engine.ranks=0")


def test_producers_stand_before_what_needs_them(tmp_path) -> None:
    plan = build_plan(config.load(["experiment=smoke"]), "cpu", 2)
    seen: set[str] = set()

    for task in plan.missing(Store(tmp_path)):
        assert set(task.inputs.values()) <= seen
        seen.add(task.fingerprint)


def test_a_change_of_the_evaluation_leaves_the_compression_alone() -> None:
    one, two = plan_of("recipe=gptq"), plan_of("recipe=gptq", "evaluation.windows.sequences=2")

    assert one.goals["gptq"].artifact == two.goals["gptq"].artifact
    assert one.goals["gptq"].export == two.goals["gptq"].export
    assert one.goals["gptq"].evaluate != two.goals["gptq"].evaluate


def test_one_model_in_several_forms_shares_all_tasks_up_to_the_export() -> None:
    auto = plan_of("recipe=gptq", "recipe.quantize.bits=3")
    both = plan_of("recipe=gptq", "recipe.quantize.bits=3", "export.format=dense,auto")

    assert set(auto.tasks) < set(both.tasks), "left to itself, the form is no part of the fingerprint"
    assert sorted(task.type for fp, task in both.tasks.items() if fp not in auto.tasks) == ["evaluate", "export", "speed"]
    exports = [task for task in both.tasks.values() if task.type == "export"]
    assert [task.spec.get("format") for task in exports] == ["dense", None]
    assert [("export.format" in task.spec["card"]["command"]) for task in exports] == [True, False]


def test_a_form_that_there_is_not_is_refused_before_anything_runs() -> None:
    from pare.orchestrator.schema import EXPORTS
    from pare.workers.export.choose import FORMATS

    assert EXPORTS == FORMATS
    with pytest.raises(ConfigError, match=r"export\.format must be one of auto, dense, .*, got 'onnx'"):
        plan_of("recipe=gptq", "export.format=onnx")


def test_the_gptq_reference_is_rtn_and_gptq_as_in_the_paper_each_as_weights_and_as_codes() -> None:
    experiment = config.load(["experiment=gptq_reference", "model=tiny"])
    plan = build_plan(experiment, "cpu", 2)

    assert len(experiment.trials) == 9
    methods = [
        task.spec["settings"] | {"method": task.spec["method"]} for task in plan.tasks.values() if task.type == "compress"
    ]
    assert sorted((m["method"], m["bits"]) for m in methods) == [("gptq", 3), ("gptq", 4), ("rtn", 3), ("rtn", 4)]
    assert {(m["group_size"], m["symmetric"], m["mse"]) for m in methods} == {(64, False, False)}
    gptq = [m for m in methods if m["method"] == "gptq"]
    assert {(m["act_order"], m["inputs"], m["damping"]) for m in gptq} == {("none", "compressed", 0.01)}
    calibration = next(t.spec for t in plan.tasks.values() if t.type == "tokens" and t.spec["role"] == "calibration")
    assert (calibration["sequences"], calibration["length"]) == (32, 512)
    assert count(plan, "export") == 9
    assert sum(t.spec.get("format") == "dense" for t in plan.tasks.values() if t.type == "export") == 4
