"""Readings, the control beside each, and the figures that are made of those which nothing disturbed."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 0.10
"""A reading does not count when its control differs by more than this from the run's median."""

SIDE, TIMES = 1024, 12
"""Of the matrices whose product is the control, and how often it is taken."""


@dataclass
class Reading:
    """What one process measured, between two readings of the control."""

    name: str
    argument: str
    round: int
    values: dict[str, float]
    before_s: float
    after_s: float
    """The control: seconds of a bare matrix product."""
    flush_ms: float = 0.0
    """Of a small file just before, for whoever wonders about a slow disk. No reading is dropped for it."""

    def is_steady(self, usual_s: float) -> bool:
        """Whether the machine was itself before and after."""
        return all(abs(control / usual_s - 1) <= TOLERANCE for control in (self.before_s, self.after_s))


def control() -> float:
    """Seconds of a matrix product on all cores, the median of a few: what a busy neighbour takes is missing here, too."""
    import torch

    a = torch.ones(SIDE, SIDE)
    taken = []
    for _ in range(TIMES):
        start = time.perf_counter()
        torch.mm(a, a)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def flush_ms() -> float:
    """Milliseconds in which a new small file reaches the disk, the median of a few, after all that waited has."""
    os.sync()
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(50):
            start = time.perf_counter()
            with open(f"{folder}/{number}", "w") as file:
                file.write("x")
                file.flush()
                os.fsync(file.fileno())
            taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def usual(readings: Sequence[Reading]) -> float:
    """The control of the run: its median over all readings."""
    return statistics.median(control for r in readings for control in (r.before_s, r.after_s))


@dataclass(frozen=True)
class Figure:
    """One of the speeds that issue 3 asks for."""

    name: str
    unit: str
    target: str
    reached: Callable[[float], bool] | None
    """None: for comparison only."""
    value: Callable[[Values], float]


class Missing(Exception):
    """No steady reading of something is there."""


@dataclass
class Values:
    """The steady readings of a run."""

    readings: Sequence[Reading]

    def median(self, name: str, argument: str, key: str) -> float:
        found = [r.values[key] for r in self.readings if (r.name, r.argument) == (name, argument)]
        if not found:
            raise Missing(f"{name} {argument}")
        return statistics.median(found)


def ms(name: str, argument: str) -> Callable[[Values], float]:
    return lambda values: values.median(name, argument, "ms")


def of_large(key: str, unit: float = 1.0) -> Callable[[Values], float]:
    return lambda values: values.median("large", "10000", key) / unit


def ratio(above: Callable[[Values], float], below: Callable[[Values], float]) -> Callable[[Values], float]:
    return lambda values: above(values) / below(values)


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


def figures(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Name, value, unit, target and whether it is reached: None where nothing is asked, or no steady reading is there."""
    usual_s = usual(readings)
    values = Values([r for r in readings if r.is_steady(usual_s)])
    found = []
    for figure in FIGURES:
        row: dict[str, Any] = {
            "name": figure.name,
            "value": None,
            "unit": figure.unit,
            "target": figure.target,
            "reached": None,
        }
        try:
            row["value"] = figure.value(values)
            row["reached"] = figure.reached(row["value"]) if figure.reached else None
        except Missing as e:
            row["missing"] = str(e)
        found.append(row)
    return found


def as_json(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    usual_s = usual(readings)
    return [{**asdict(r), "kept": r.is_steady(usual_s)} for r in readings]
