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


def long_control() -> float:
    """The same, on average over some seconds: beside readings of a minute, in which short bursts even out as well."""
    import torch

    a = torch.ones(2 * SIDE, 2 * SIDE)
    torch.mm(a, a)
    start = time.perf_counter()
    for _ in range(TIMES):
        torch.mm(a, a)
    return (time.perf_counter() - start) / TIMES


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
    """One of the speeds that are asked for."""

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


def ratio(above: Callable[[Values], float], below: Callable[[Values], float]) -> Callable[[Values], float]:
    return lambda values: above(values) / below(values)


def figures(asked: Sequence[Figure], readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Name, value, unit, target and whether it is reached: None where nothing is asked, or no steady reading is there."""
    usual_s = usual(readings)
    values = Values([r for r in readings if r.is_steady(usual_s)])
    found = []
    for figure in asked:
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
