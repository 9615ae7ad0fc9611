"""The plans made by hand, and the driver that the benchmarks run them with."""

from pathlib import Path

import pytest

from benchmarks.orchestration import driver, graphs
from pare.orchestrator.pool import InlinePool
from pare.orchestrator.schedule import schedule


def test_three_choices_at_three_stages_are_39_tasks_of_27_trials() -> None:
    plan = graphs.sweep()

    assert (len(plan.tasks), len(plan.goals)) == (39, 27)
    assert all(1.0 <= task.spec["seconds"] <= 2.0 for task in plan.tasks.values())


def test_the_long_pole_is_named_last_and_makes_up_most_of_the_shortest_schedule() -> None:
    plan = graphs.long_pole()
    durations = {fp: float(task.spec["seconds"]) for fp, task in plan.tasks.items()}
    tasks = list(plan.tasks.values())

    best = schedule(tasks, durations, 4)
    pole = sum(durations[fp] for fp in plan.goals["pole"].tasks)

    assert best.critical_s == pytest.approx(pole)
    assert best.makespan_s < 1.2 * pole
    assert tasks[-1].fingerprint == plan.goals["pole"].artifact


def test_a_plan_is_driven_to_its_end_in_this_process(tmp_path: Path) -> None:
    assert driver.drive(tmp_path, graphs.trivial(5), InlinePool(), "bench") > 0
    assert len(list((tmp_path / "store" / "objects").glob("*/*"))) == 5


def test_a_task_that_fails_is_no_reading(tmp_path: Path) -> None:
    def broken(requests: list[dict[str, object]]) -> list[dict[str, object]]:
        return [{"ok": False, "failure": "unknown", "message": "as told", "cost": {}} for _ in requests]

    with pytest.raises(RuntimeError, match="unknown: as told"):
        driver.drive(tmp_path, graphs.trivial(1), InlinePool(broken), "bench")
