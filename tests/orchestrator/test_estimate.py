"""What a plan will cost: schedules with known ends, estimates that follow the work, reasons, refusals, the drawing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pare.orchestrator import config, drawing, hardware, preflight
from pare.orchestrator.errors import InfeasibleError
from pare.orchestrator.estimate import Estimate, Estimator, History, accuracy
from pare.orchestrator.explain import explain, reasons
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.machine import Machine, machine
from pare.orchestrator.plan import Goals, Plan, Task, build_plan
from pare.orchestrator.schedule import Schedule, ranks, schedule
from pare.orchestrator.work import WORK, Shape

SPEED = Machine(float32=1e11, bfloat16=2e11, bandwidth=3e10)
TINY = ["model=tiny", "evaluation.questions.n=4"]


def task(name: str, *inputs: str, kind: str = "compress", **spec: object) -> Task:
    record = {"type": kind, "spec": spec, "inputs": dict(zip("abcdefgh", inputs, strict=False))}
    return Task(name, kind, name, spec, {}, record["inputs"], record, ["t"])


@functools.cache
def plan_of(*overrides: str) -> Plan:
    """One plan for all tests that ask for the same and change nothing in it."""
    return build_plan(config.load([*TINY, *overrides]), "cpu", 2)


def only(plan: Plan, kind: str, label: str = "") -> Task:
    (found,) = [t for t in plan.tasks.values() if t.type == kind and label in t.label]
    return found


def estimate(plan: Plan, kind: str, label: str = "", history: History | None = None) -> Estimate:
    return Estimator(plan, history or History({}, {}), "cpu", 2, SPEED).estimate(only(plan, kind, label))


def history_of(plan: Plan, cost: dict[str, float], *kinds: str) -> History:
    """As if every task of those types had run at that cost."""
    done = {fp: t.record for fp, t in plan.tasks.items()}
    return History({fp: cost for fp, t in plan.tasks.items() if t.type in kinds}, done)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_a_chain_takes_the_sum_and_a_fork_its_longer_side() -> None:
    chain = [task("a"), task("b", "a"), task("c", "b")]
    fork = [task("a"), task("b", "a"), task("c", "a"), task("d", "b", "c")]

    assert schedule(chain, {"a": 1, "b": 2, "c": 3}, 4).makespan_s == 6
    found = schedule(fork, {"a": 1, "b": 5, "c": 2, "d": 1}, 2)
    assert (found.makespan_s, found.critical_s, found.critical_path) == (7, 7, ["a", "b", "d"])
    assert schedule(fork, {"a": 1, "b": 5, "c": 2, "d": 1}, 1).makespan_s == 9


def test_the_head_of_the_longest_chain_starts_first_wherever_it_stands() -> None:
    tasks = [task("short1"), task("short2"), task("short3"), task("head"), task("tail", "head")]
    durations = {"short1": 2, "short2": 2, "short3": 2, "head": 1, "tail": 6}

    found = schedule(tasks, durations, 2)

    assert found.start_s["head"] == 0
    assert found.makespan_s == 7
    assert ranks(tasks, durations) == {"short1": 2, "short2": 2, "short3": 2, "head": 7, "tail": 6}


def test_what_runs_alone_comes_last_and_one_at_a_time() -> None:
    tasks = [task("s1", kind="speed"), task("a"), task("s2", "a", kind="speed"), task("b")]

    found = schedule(tasks, {"s1": 3, "a": 1, "s2": 2, "b": 4}, 2, alone={"speed"})

    assert found.makespan_s == 4 + 3 + 2
    assert min(found.start_s["s1"], found.start_s["s2"]) == 4
    assert found.start_s["s2"] >= found.end_s["s1"] or found.start_s["s1"] >= found.end_s["s2"]


def test_what_takes_several_slots_waits_for_them_and_nothing_takes_them_meanwhile() -> None:
    tasks = [task("a"), task("b"), task("wide"), task("tail", "wide"), task("small")]
    durations = {"a": 9, "b": 9, "wide": 2, "tail": 6, "small": 1}

    found = schedule(tasks, durations, 2, widths={"wide": 2})

    assert (found.start_s["wide"], found.start_s["small"]) == (9, 11)
    assert found.makespan_s == 9 + 2 + 6
    with pytest.raises(ValueError, match="needs 3 slots, got 2"):
        schedule(tasks, durations, 2, widths={"wide": 3})


def test_an_input_that_is_there_already_is_not_waited_for() -> None:
    assert schedule([task("b", "a")], {"b": 2}, 1).makespan_s == 2
    assert schedule([], {}, 1).makespan_s == 0


def test_tasks_in_a_circle_are_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        schedule([task("a", "b"), task("b", "a")], {"a": 1, "b": 1}, 1)


def random_graph(chance: random.Random, n: int) -> tuple[list[Task], dict[str, float]]:
    tasks = []
    for i in range(n):
        before = [f"t{j}" for j in range(i) if chance.random() < 0.3]
        tasks.append(
            task(f"t{i}", *before[:8], kind=chance.choice(["compress", "compress", "speed"]) if not before else "score")
        )
    chance.shuffle(tasks)
    return tasks, {t.fingerprint: float(chance.randint(0, 5)) for t in tasks}


def check_valid(tasks: Sequence[Task], durations: dict[str, float], slots: int, found: Schedule) -> None:
    start, end = found.start_s, found.end_s
    assert set(start) == set(end) == set(durations)
    for t in tasks:
        assert end[t.fingerprint] - start[t.fingerprint] == durations[t.fingerprint]
        assert all(start[t.fingerprint] >= end[fp] for fp in t.inputs.values() if fp in end)
    for moment in start.values():
        assert sum(start[fp] <= moment < end[fp] for fp in start) <= slots
    assert found.makespan_s == max(end.values())


@pytest.mark.parametrize("seed", range(40))
def test_schedules_of_random_graphs_are_valid_and_near_the_best(seed: int) -> None:
    chance = random.Random(seed)
    tasks, durations = random_graph(chance, chance.randint(2, 6))
    slots = chance.randint(1, 3)

    found = schedule(tasks, durations, slots)
    check_valid(tasks, durations, slots, found)
    work = sum(durations.values())
    assert max(found.critical_s, work / slots) <= found.makespan_s <= work / slots + found.critical_s * (1 - 1 / slots) + 1e-9
    best = min(best_of(order, durations, slots) for order in permutations(tasks))
    assert best <= found.makespan_s <= best * (2 - 1 / slots) + 1e-9
    assert schedule(tasks, durations, slots) == found


def best_of(order: Sequence[Task], durations: dict[str, float], slots: int) -> float:
    """Makespan when tasks start in exactly this order, each as early as its inputs and a slot allow."""
    free, end = [0.0] * slots, dict[str, float]()
    for t in order:
        before = [fp for fp in t.inputs.values() if fp in durations]
        if any(fp not in end for fp in before):
            return float("inf")
        free.sort()
        start = max([free[0], *(end[fp] for fp in before)])
        free[0] = end[t.fingerprint] = start + durations[t.fingerprint]
    return max(end.values())


@pytest.mark.parametrize("seed", range(10))
def test_schedules_with_tasks_that_run_alone_are_valid(seed: int) -> None:
    chance = random.Random(seed)
    tasks, durations = random_graph(chance, 12)

    found = schedule(tasks, durations, 3, alone={"speed"})

    check_valid(tasks, durations, 3, found)
    for t in tasks:
        if t.type == "speed" and durations[t.fingerprint]:
            span = (found.start_s[t.fingerprint], found.end_s[t.fingerprint])
            others = [o.fingerprint for o in tasks if o is not t]
            assert not any(found.start_s[o] < span[1] and found.end_s[o] > span[0] for o in others)


def test_forty_thousand_tasks_are_scheduled_in_a_second() -> None:
    tasks = [task("root")]
    for i in range(10_000):
        tasks += [task(f"c{i}", "root"), task(f"x{i}", f"c{i}"), task(f"s{i}", f"c{i}"), task(f"e{i}", f"x{i}", f"s{i}")]
    durations = {t.fingerprint: 1.0 + i % 7 for i, t in enumerate(tasks)}

    start = time.process_time()
    found = schedule(tasks, durations, 8, alone={"speed"})

    assert time.process_time() - start < 2
    assert found.makespan_s == pytest.approx(sum(durations.values()) / 8, rel=0.01)


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_every_task_of_a_plan_has_an_estimate_and_its_type_a_function() -> None:
    plan = plan_of("experiment=smoke")

    found = Estimator(plan, History({}, {}), "cpu", 2, SPEED).estimates()

    assert set(found) == set(plan.tasks)
    assert {t.type for t in plan.tasks.values()} <= set(WORK)
    assert all(e.wall_s > 0 and e.peak_bytes > 1e7 and e.disk_bytes > 0 and e.source == "shape" for e in found.values())
    assert all(e.gpu_s == 0 for e in found.values())


@pytest.mark.parametrize(
    ("kind", "small", "large"),
    [
        ("train", ["recipe=lora", "recipe.tune.steps=4"], ["recipe=lora", "recipe.tune.steps=9"]),
        ("train", ["recipe=lora", "recipe.tune.rank=4"], ["recipe=lora", "recipe.tune.rank=32"]),
        ("train", ["recipe=lora", "data.train.length=64"], ["recipe=lora", "data.train.length=256"]),
        ("score", ["recipe=base", "evaluation.windows.sequences=4"], ["recipe=base", "evaluation.windows.sequences=16"]),
        ("evaluate", ["recipe=base", "evaluation.questions.n=4"], ["recipe=base", "evaluation.questions.n=40"]),
        ("calibrate", ["recipe=gptq", "data.calibration.sequences=4"], ["recipe=gptq", "data.calibration.sequences=16"]),
        ("compress", ["recipe=gptq", "recipe.quantize.bits=2"], ["recipe=gptq", "recipe.quantize.bits=8"]),
        ("compress", ["recipe=rtn", "recipe.quantize.mse=false"], ["recipe=rtn", "recipe.quantize.mse=true"]),
        ("import_model", ["recipe=base", "model.tiny.layers=2"], ["recipe=base", "model.tiny.layers=8"]),
        ("export", ["recipe=rtn", "model.tiny.width=128"], ["recipe=rtn", "model.tiny.width=256"]),
        ("speed", ["recipe=base", "evaluation.speed.new_tokens=8"], ["recipe=base", "evaluation.speed.new_tokens=64"]),
    ],
)
def test_more_work_is_never_estimated_lower(kind: str, small: list[str], large: list[str]) -> None:
    one, two = (estimate(plan_of(*overrides), kind) for overrides in (small, large))

    assert (two.wall_s, two.peak_bytes, two.disk_bytes) > (one.wall_s, one.peak_bytes, one.disk_bytes)
    assert all(getattr(two, name) >= getattr(one, name) for name in ("wall_s", "peak_bytes", "disk_bytes"))


def test_the_bytes_of_codes_and_adapters_follow_from_the_settings() -> None:
    plan = plan_of("recipe=rtn", "recipe.quantize.bits=4", "recipe.quantize.group_size=64")
    shape = Shape.of(next(iter(plan.models.values())))

    assert estimate(plan, "compress").disk_bytes == shape.linears * (4 + 16 / 64) / 8
    lora = plan_of("recipe=lora", "recipe.tune.rank=8")
    assert estimate(lora, "train").disk_bytes == 2 * 4 * 8 * shape.spans
    assert estimate(lora, "export").disk_bytes < estimate(plan, "export").disk_bytes < estimate(plan, "import_model").disk_bytes


def test_qlora_adds_to_the_codes_of_the_stage_before_and_makes_none() -> None:
    stages = ["recipe=gptq", "recipe.quantize.bits=2", "+method@recipe.tune=qlora"]
    tuned, codes = (estimate(plan_of(*stages), kind).disk_bytes for kind in ("train", "compress"))
    lora = estimate(plan_of("recipe=lora"), "train").disk_bytes

    assert tuned == codes + lora
    assert estimate(plan_of("recipe=qlora"), "train").disk_bytes > tuned, "4 bits, and not 2"


def test_memory_counts_what_waits_in_it_and_not_what_lies_in_files() -> None:
    def peak(sequences: int) -> float:
        size = [f"data.calibration.sequences={sequences}", "data.calibration.length=2048"]
        return estimate(plan_of("recipe=gptq", *size), "calibrate").peak_bytes

    assert peak(64) > peak(8)
    assert peak(2**22) == peak(2**21), "from there on hidden states are in files"
    codes, dense = (estimate(plan_of("recipe=gptq", f"export.format={f}"), "export", "gptq") for f in ("auto", "dense"))
    assert dense.disk_bytes > codes.disk_bytes
    assert dense.peak_bytes > codes.peak_bytes


def test_a_task_that_has_run_costs_what_it_did() -> None:
    plan = plan_of("recipe=lora")
    cost = {"wall_s": 77.0, "cpu_s": 70.0, "memory_start_bytes": 5e8, "peak_rss_bytes": 9e8, "disk_bytes": 1234.0}

    found = estimate(plan, "train", history=history_of(plan, cost, "train"))

    assert (found.wall_s, found.peak_bytes, found.disk_bytes, found.source) == (77.0, 9e8, 1234.0, "own")


def test_the_cost_of_a_like_task_is_scaled_by_the_ratio_of_the_works() -> None:
    known, new = plan_of("recipe=lora", "recipe.tune.steps=10"), plan_of("recipe=lora", "recipe.tune.steps=30")
    before, after = estimate(known, "train"), estimate(new, "train")
    cost = {"wall_s": 10 * before.wall_s, "cpu_s": 1.0, "memory_start_bytes": 4e8, "peak_rss_bytes": 9e8, "disk_bytes": 5000.0}

    found = estimate(new, "train", history=history_of(known, cost, "train"))

    assert found.wall_s == pytest.approx(10 * after.wall_s)
    assert found.wall_s > 10 * before.wall_s
    assert found.peak_bytes == 9e8, "the same memory, for only the steps are more"
    assert (found.disk_bytes, found.source) == (5000.0, "like")


def test_memory_scales_only_above_what_the_process_held_before() -> None:
    known, new = plan_of("recipe=lora", "data.train.length=64"), plan_of("recipe=lora", "data.train.length=512")
    cost = {"wall_s": 1.0, "cpu_s": 1.0, "memory_start_bytes": 6e8, "peak_rss_bytes": 7e8}

    found = estimate(new, "train", history=history_of(known, cost, "train"))

    grown = [Estimator(p, History({}, {}), "cpu", 2, SPEED).view(only(p, "train").fingerprint) for p in (known, new)]
    memory = [view.work.memory for view in grown if view]
    assert found.peak_bytes == pytest.approx(6e8 + 1e8 * memory[1] / memory[0])


def test_a_peak_without_its_start_is_not_believed() -> None:
    plan = plan_of("recipe=base")

    found = estimate(plan, "export", history=history_of(plan, {"wall_s": 1.0, "cpu_s": 1.0, "peak_rss_bytes": 9e9}, "export"))

    assert found.peak_bytes == estimate(plan, "export").peak_bytes


def test_the_nearest_of_several_known_tasks_is_taken() -> None:
    known = plan_of("recipe=gptq", "recipe.quantize.bits=3", "recipe.quantize.mse=true,false")
    of = {str(t.spec["settings"]["mse"]): fp for fp, t in known.tasks.items() if t.type == "compress"}
    history = History(
        {of["True"]: {"wall_s": 50.0, "cpu_s": 50.0}, of["False"]: {"wall_s": 2.0, "cpu_s": 2.0}},
        {fp: t.record for fp, t in known.tasks.items()},
    )

    assert estimate(plan_of("recipe=gptq", "recipe.quantize.mse=true"), "compress", history=history).wall_s == pytest.approx(50)
    assert estimate(plan_of("recipe=gptq", "recipe.quantize.mse=false"), "compress", history=history).wall_s == pytest.approx(2)


def test_a_score_after_a_method_that_never_ran_is_known_from_other_scores_but_the_method_is_not() -> None:
    known, new = plan_of("recipe=rtn"), plan_of("recipe=gptq")
    history = history_of(known, {"wall_s": 9.0, "cpu_s": 9.0}, "score", "compress")

    assert estimate(new, "score", "gptq", history).wall_s == pytest.approx(9)
    assert estimate(new, "score", "gptq", history).source == "like"
    assert estimate(new, "compress", history=history).source == "shape"


def test_another_model_is_nothing_alike() -> None:
    history = history_of(plan_of("recipe=rtn"), {"wall_s": 9.0, "cpu_s": 9.0}, "compress", "score", "export", "import_model")

    assert estimate(plan_of("recipe=rtn", "model.tiny.seed=1"), "compress", history=history).source == "shape"


def test_history_is_read_from_a_ledger(tmp_path: Path) -> None:
    plan = plan_of("recipe=rtn")
    ledger = Ledger(tmp_path, write=True)
    for fingerprint, t in plan.tasks.items():
        ledger.put_task(fingerprint, t.type, t.label, t.record, "pending")
    done = only(plan, "compress").fingerprint
    ledger.put_result(done, "d", {}, {"wall_s": 5.0, "cpu_s": 5.0})

    history = History.read(ledger)

    assert history.costs == {done: {"wall_s": 5.0, "cpu_s": 5.0}}
    assert estimate(plan_of("recipe=rtn", "recipe.quantize.bits=2"), "compress", history=history).wall_s == pytest.approx(5)
    assert History.read(None).costs == {}
    ledger.close()


def test_accuracy_says_how_near_the_estimates_came() -> None:
    guess = Estimate(wall_s=10, peak_bytes=1.1e9, disk_bytes=100, gpu_s=0, slots=1, source="like")
    costs = {
        "a": {"wall_s": 8.0, "cpu_s": 4.0, "memory_start_bytes": 5e8, "peak_rss_bytes": 1e9, "disk_bytes": 50},
        "b": {"wall_s": 12.0, "cpu_s": 6.0, "memory_start_bytes": 5e8, "peak_rss_bytes": 2e9, "disk_bytes": 50},
        "unplanned": {"wall_s": 100.0, "cpu_s": 100.0, "peak_rss_bytes": 1e9},
    }

    found = accuracy({"a": guess, "b": guess}, costs)

    assert (found["tasks"], found["time_ratio"], found["waiting"]) == (2, 1.0, 2.0)
    assert (found["peak_within_15_percent"], found["disk_ratio"]) == (0.5, 2.0)
    assert accuracy({}, costs) == {"tasks": 0}


def test_this_machine_can_be_probed() -> None:
    found = machine("cpu")

    assert 1e8 < found.float32 < 1e14
    assert 1e8 < found.bandwidth < 1e13


# -- why ---------------------------------------------------------------------------------------------------------------


def test_explain_names_exactly_the_seeded_changes_to_the_nearest_record() -> None:
    record = {"type": "compress", "spec": {"settings": {"bits": 4, "g": [1, 2]}}, "inputs": {"model": "m"}, "code": "c"}
    far = json.loads(json.dumps(record)) | {"code": "other", "inputs": {"model": "n", "tokens": "t"}}
    near = json.loads(json.dumps(record))
    near["spec"]["settings"] = {"bits": 3, "g": [1, 2], "gone": True}

    found = explain(record, {"far": far, "near": near, "other": record | {"type": "score"}})

    assert found == ("near", [("spec.settings.bits", 3, 4), ("spec.settings.gone", True, None)])
    assert explain(record, {}) == (None, [])
    assert explain(record, {"other": record | {"type": "score"}}) == (None, [])


def test_reasons_name_the_change_the_new_input_and_the_lost_result() -> None:
    known, new = plan_of("recipe=rtn", "recipe.quantize.bits=3"), plan_of("recipe=rtn", "recipe.quantize.bits=2")
    records = {fp: t.record for fp, t in known.tasks.items()}
    states = {fp for fp in new.tasks if fp not in known.tasks}
    lost = only(new, "corpus").fingerprint

    found = reasons(new, [*states, lost], records)

    assert found[only(new, "compress").fingerprint] == "spec.settings.bits 3 -> 2"
    assert found[only(new, "export").fingerprint] == "its model is new: rtn rtn"
    assert found[lost] == "has run before, and its result is no longer in the store"
    assert set(reasons(new, new.tasks, {}).values()) >= {"nothing like it has run"}


def test_a_changed_body_of_code_is_a_reason_of_its_own() -> None:
    plan = plan_of("recipe=rtn")
    old = {fp: t.record | {"code": "0" * 64} for fp, t in plan.tasks.items() if t.type == "corpus"}
    corpus = only(plan, "corpus").fingerprint

    assert reasons(plan, [corpus], {"before": old[corpus]}) == {corpus: "the code has changed"}


# -- what a plan says, and what it refuses -----------------------------------------------------------------------------


def test_a_summary_adds_up_and_is_plain_json(tmp_path: Path) -> None:
    plan = plan_of("recipe=gptq", "recipe.quantize.bits=3,4")
    states = {fp: "cached" if t.type in ("import_model", "corpus") else "new" for fp, t in plan.tasks.items()}
    there = preflight.Supply("cpu", 2, 64 * 10**9, None, 10**12)

    said = json.loads(json.dumps(preflight.summary(plan, states, History({}, {}), there)))

    new = [fp for fp, state in states.items() if state == "new"]
    assert set(said["new"]) == set(new)
    assert said["tasks"]["new"] == len(new)
    assert said["work_s"] == pytest.approx(sum(said["new"][fp]["wall_s"] for fp in new))
    assert said["critical_path_s"] <= said["makespan_s"] <= said["work_s"]
    assert said["critical_path"][-1]["label"].startswith(("evaluate", "speed"))
    assert said["peak_bytes"] <= said["peak_at_once_bytes"]
    assert said["cannot_fit"] == []
    assert any("longest chain" in line for line in preflight.footer(said))
    nothing = preflight.summary(plan, dict.fromkeys(states, "cached"), History({}, {}), there)
    assert preflight.footer(nothing) == ["nothing to run"]


def test_a_late_task_counts_as_work_and_says_so() -> None:
    plan = copy.deepcopy(plan_of("recipe=rtn"))
    late = only(plan, "compress")
    late.late = True
    states = {fp: "late" if t.late else "cached" for fp, t in plan.tasks.items()}

    said = preflight.summary(plan, states, History({}, {}), preflight.Supply("cpu", 2))

    assert list(said["new"]) == [late.fingerprint]
    assert said["new"][late.fingerprint]["why"].startswith("late")


def test_what_does_not_fit_is_named_with_need_and_supply() -> None:
    plan = plan_of("recipe=lora")
    tasks = list(plan.tasks.values())
    estimates = preflight.estimates_of(plan, tasks, "cpu", 2)

    def missing(**there: int) -> list[str]:
        return [short["what"] for short in preflight.shortages(plan, tasks, estimates, preflight.Supply("cpu", 2, **there))]

    assert missing(memory_bytes=10**7, disk_bytes=10**4) == ["memory", "disk"]
    assert missing(memory_bytes=10**12, disk_bytes=10**12) == []
    assert missing() == [], "what a cluster has is not guessed"
    short = preflight.shortages(plan, tasks, estimates, preflight.Supply("cpu", 2, memory_bytes=10**7))[0]
    assert short["need_bytes"] == max(round(e.peak_bytes) for e in estimates.values())
    assert f"'{short['label']}'" in short["message"]


def test_more_ranks_than_slots_are_refused_and_those_that_fit_take_as_much_room_and_less_time() -> None:
    narrow, wide = (plan_of("recipe=lora", "recipe.tune.batch_size=6", f"engine.ranks={n}") for n in (1, 3))
    tasks = list(wide.tasks.values())
    one, three = estimate(narrow, "train"), estimate(wide, "train")

    def missing(there: preflight.Supply) -> list[str]:
        found = preflight.shortages(wide, tasks, preflight.estimates_of(wide, tasks, "cpu", 2), there)
        return [short["message"] for short in found]

    assert (one.slots, three.slots) == (1, 3)
    assert three.peak_bytes == 3 * one.peak_bytes
    assert three.wall_s == pytest.approx(one.wall_s / 3)
    assert missing(preflight.Supply("cpu", 3)) == []
    assert missing(preflight.Supply("cpu", 2, is_here=False)) == [], "what a cluster has is not guessed"
    assert missing(preflight.Supply("cpu", 2)) == [
        "not enough slots: 'lora lora' wants engine.ranks=3, and there is room for 2 at once. Try: engine.ranks=2"
    ]


def test_as_many_slots_as_the_largest_tasks_leave_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = config.load([*TINY, "recipe=lora"])
    plan = build_plan(experiment, "cpu", 2)
    tasks = list(plan.tasks.values())
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    peaks = {t.fingerprint: Estimate(1, 1e9 if t.type == "train" else 0.5e9, 0, 0, 1) for t in tasks}

    def slots(free: float) -> int:
        monkeypatch.setattr(hardware, "free_memory", lambda limit=None: int(free))
        return preflight.slots_for(experiment, "cpu", tasks, peaks)

    assert [slots(n * 1e9) for n in (0.5, 1, 1.5, 2, 100)] == [1, 1, 2, 3, 4]
    experiment.cluster.slots = 7
    assert slots(1) == 7


def test_a_plan_that_cannot_fit_is_refused_with_the_estimates_of_its_history(tmp_path: Path) -> None:
    experiment = config.load([*TINY, "recipe=rtn", "cluster.memory_gb=4"])
    plan = build_plan(experiment, "cpu", 2)
    tasks = list(plan.tasks.values())
    cost = {"wall_s": 1.0, "cpu_s": 1.0, "memory_start_bytes": 1e8, "peak_rss_bytes": 9e9}
    learned = preflight.estimates_of(plan, tasks, "cpu", 2, history_of(plan, cost, "export"))

    with pytest.raises(InfeasibleError, match=r"not enough memory: 'export rtn' needs about 9.0 GB"):
        preflight.check_feasible(plan, tasks, experiment, tmp_path, "cpu", learned)


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "< 1 s"), (45, "45 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations_are_said_in_the_units_of_a_person(seconds: float, said: str) -> None:
    assert preflight.duration(seconds) == said


# -- the drawing -------------------------------------------------------------------------------------------------------


def boxes(picture: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(picture).findall("{http://www.w3.org/2000/svg}g")


def test_the_drawing_is_xml_with_a_box_for_each_task_in_its_states_colour() -> None:
    plan = copy.deepcopy(plan_of("experiment=smoke"))
    states = {fp: "cached" if t.type == "corpus" else "late" if t.type == "train" else "new" for fp, t in plan.tasks.items()}
    estimates = preflight.estimates_of(plan, list(plan.tasks.values()), "cpu", 2)
    next(iter(plan.tasks.values())).label = "a < b & c"

    found = boxes(drawing.svg(plan, states, estimates))

    assert len(found) == len(plan.tasks)
    titles = {g[0].text.split("\n")[1]: g for g in found if g[0].text}
    for fingerprint, state in states.items():
        assert titles[fingerprint[:12]][1].get("fill") == drawing.COLOURS[state][0]
    spots = {(g[1].get("x"), g[1].get("y")) for g in found}
    assert len(spots) == len(plan.tasks), "no two boxes lie on one another"


def test_producers_stand_left_of_what_reads_them() -> None:
    plan = Plan(
        {t.fingerprint: t for t in (task("a"), task("b", "a"), task("c", "a", "b"))}, {"t": Goals("c", "c", "c", "c", None)}
    )

    found = boxes(drawing.svg(plan, dict.fromkeys("abc", "new"), {}))

    x = {g[0].text.split("\n")[0]: float(g[1].get("x", "nan")) for g in found if g[0].text}
    assert x["a"] < x["b"] < x["c"]


def test_a_large_plan_is_drawn_by_type_with_counts() -> None:
    tasks = [task("root", kind="import_model"), *(task(f"c{i}", "root") for i in range(400))]
    plan = Plan({t.fingerprint: t for t in tasks})
    states = {t.fingerprint: "cached" if t.fingerprint in ("root", "c0") else "new" for t in tasks}

    picture = drawing.svg(plan, states, {})

    assert len(boxes(picture)) == 3
    assert "399 × compress" in picture


def test_estimates_stay_plain_values() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(Estimate(1.0, 2.0, 3.0, 0.0, 1))))["wall_s"] == 1.0
