"""Which readings count, and what the figures make of them."""

from benchmarks.orchestration.figures import FIGURES
from benchmarks.readings import Reading, figures, usual


def reading(name: str, argument: str, control_s: float = 1.0, **values: float) -> Reading:
    return Reading(name, argument, 0, values, control_s, control_s)


def value_of(readings: list[Reading], name: str) -> tuple[float | None, bool | None]:
    return next((f["value"], f["reached"]) for f in figures(FIGURES, readings) if f["name"] == name)


def test_a_figure_is_the_median_of_the_steady_readings() -> None:
    readings = [reading("pare_tasks", "1000", ms=ms) for ms in (1.0, 2.0, 9.0)]
    readings.append(reading("pare_tasks", "1000", control_s=1.2, ms=100.0))

    assert usual(readings) == 1.0
    assert value_of(readings, "a task, 1,000 tasks") == (2.0, True)


def test_a_reading_whose_control_moved_on_either_side_does_not_count() -> None:
    disturbed = Reading("pare_tasks", "1000", 0, {"ms": 1.0}, 1.0, 1.11)
    steady = [reading("prototype", "1000", ms=1.0) for _ in range(3)]

    assert value_of([disturbed, *steady], "a task, 1,000 tasks") == (None, None)
    assert not disturbed.is_steady(1.0)
    assert Reading("pare_tasks", "1000", 0, {"ms": 1.0}, 0.91, 1.09).is_steady(1.0)


def test_a_missed_target_is_said_and_a_missing_reading_is_named() -> None:
    readings = [reading("pare_tasks", "1000", ms=2.0), reading("tune_trials", "500", ms=40.0)]

    assert value_of(readings, "below Ray Tune") == (20.0, False)
    missing = next(f for f in figures(FIGURES, readings) if f["name"] == "growth from 1,000 to 10,000 tasks")
    assert missing["missing"] == "pare_tasks 10000"
    assert missing["reached"] is None
