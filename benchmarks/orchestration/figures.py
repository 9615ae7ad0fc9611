"""The figures that are made of the readings of this benchmark."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.readings import Figure, Values, ratio


def ms(name: str, argument: str) -> Callable[[Values], float]:
    return lambda values: values.median(name, argument, "ms")


def of_large(key: str, unit: float = 1.0) -> Callable[[Values], float]:
    return lambda values: values.median("large", "10000", key) / unit


def makespan(graph: str) -> Callable[[Values], float]:
    return lambda values: values.median("makespan", graph, "ratio")


PARE, MANY, TRACKED = ms("pare_tasks", "1000"), ms("pare_tasks", "10000"), ms("pare_tracked", "500")
FLOOR = ms("prototype", "1000")
TUNE, TUNE_TRACKED = ms("tune_trials", "500"), ms("tune_tracked", "200")

FIGURES = (
    Figure("a task, 1,000 tasks", "ms", "<= 2.5", lambda x: x <= 2.5, PARE),
    Figure("a task, 10,000 tasks", "ms", "<= 2.5", lambda x: x <= 2.5, MANY),
    Figure("growth from 1,000 to 10,000 tasks", "times", "< 1.3", lambda x: x < 1.3, ratio(MANY, PARE)),
    Figure("below Ray Tune", "times", ">= 30", lambda x: x >= 30, ratio(TUNE, PARE)),
    Figure("with tracking, below Ray Tune without", "times", ">= 3", lambda x: x >= 3, ratio(TUNE, TRACKED)),
    Figure("with tracking, below Ray Tune with its own", "times", "", None, ratio(TUNE_TRACKED, TRACKED)),
    Figure("a trial, tracked", "ms", "", None, TRACKED),
    Figure("a trial of Ray Tune", "ms", "", None, TUNE),
    Figure("a trial of Ray Tune, tracked", "ms", "", None, TUNE_TRACKED),
    Figure("a call of a bare Ray actor", "ms", "", None, ms("ray_tasks", "1000")),
    Figure("a run of bare MLflow", "ms", "", None, ms("mlflow_runs", "200")),
    Figure("a prototype's task", "ms", "", None, FLOOR),
    Figure("above the prototype", "times", "", None, ratio(PARE, FLOOR)),
    Figure("growth of the prototype, which is the disk's", "times", "", None, ratio(ms("prototype", "10000"), FLOOR)),
    Figure("with tracking, until the sweep is done", "ms", "", None, lambda v: v.median("pare_tracked", "500", "sweep_ms")),
    Figure("sleeping sweep, against its schedule", "times", "<= 1.05", lambda x: x <= 1.05, makespan("sweep")),
    Figure("long pole, against its schedule", "times", "<= 1.05", lambda x: x <= 1.05, makespan("long_pole")),
    Figure("driver's memory, 10,000 trials", "GiB", "< 1", lambda x: x < 1, of_large("driver_bytes", 2**30)),
    Figure("pare plan, 10,000 trials", "s", "< 20", lambda x: x < 20, of_large("plan_s")),
    Figure("pare status, 10,000 trials", "s", "< 1.5", lambda x: x < 1.5, of_large("status_s")),
)
