"""When each task would run: list scheduling by upward rank, on slots that cost nothing to hand over.

The rank of a task is the time from its start to the end of all that waits for it, were there slots without number
(Topcuoglu, Hariri, Wu, 2002, "Performance-effective and low-complexity task scheduling", eq. 8, without communication).
Whenever a slot is free it takes the ready task of the highest rank. The engine goes by the same ranks, so a schedule is
what a run comes to if its estimates are right and the driver takes no time.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Node(Protocol):
    """What a schedule needs to know of a task."""

    fingerprint: str
    type: str
    inputs: dict[str, str]


@dataclass(frozen=True)
class Schedule:
    makespan_s: float
    start_s: dict[str, float]
    """Fingerprint -> seconds after the beginning."""
    end_s: dict[str, float]
    critical_path: list[str]
    """Fingerprints along the longest chain, its beginning first: no number of slots makes the work shorter than that."""
    critical_s: float


def successors(tasks: Sequence[Node]) -> dict[str, list[str]]:
    """Fingerprint -> the tasks among `tasks` that read its result, each once."""
    after: dict[str, list[str]] = {task.fingerprint: [] for task in tasks}
    for task in tasks:
        for producer in dict.fromkeys(task.inputs.values()):
            if producer in after:
                after[producer].append(task.fingerprint)
    return after


def in_order(tasks: Sequence[Node], after: Mapping[str, list[str]]) -> list[str]:
    """Fingerprints, producers first.

    Raises:
        ValueError: the tasks go round in a circle.
    """
    waiting = {task.fingerprint: sum(fp in after for fp in set(task.inputs.values())) for task in tasks}
    order = [fp for fp, n in waiting.items() if n == 0]
    for fingerprint in order:
        for follower in after[fingerprint]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                order.append(follower)
    if len(order) < len(tasks):
        raise ValueError(f"{len(tasks) - len(order)} tasks wait for each other")
    return order


def ranks(tasks: Sequence[Node], durations: Mapping[str, float]) -> dict[str, float]:
    """Fingerprint -> seconds from the task's start to the end of the longest chain that begins with it."""
    after = successors(tasks)
    rank: dict[str, float] = {}
    for fingerprint in reversed(in_order(tasks, after)):
        rank[fingerprint] = durations[fingerprint] + max((rank[fp] for fp in after[fingerprint]), default=0.0)
    return rank


def schedule(
    tasks: Sequence[Node],
    durations: Mapping[str, float],
    slots: int,
    alone: Collection[str] = frozenset(),
    widths: Mapping[str, int] | None = None,
) -> Schedule:
    """Simulates `tasks` on `slots`. Equal ranks keep the order of `tasks`; inputs that are not among them are there already.

    alone: types of tasks that take every slot, one after another, when nothing else is left to run.
    widths: fingerprint -> slots of a task that takes several; nothing else is started until they are free.
    """
    widths = widths or {}
    if slots < max(widths.values(), default=1):
        raise ValueError(f"a schedule needs {max(widths.values(), default=1)} slots, got {slots}")
    rank, after = ranks(tasks, durations), successors(tasks)
    waiting = {task.fingerprint: sum(fp in after for fp in set(task.inputs.values())) for task in tasks}
    entry = {task.fingerprint: (-rank[task.fingerprint], i, task.fingerprint) for i, task in enumerate(tasks)}
    apart = {task.fingerprint for task in tasks if task.type in alone}
    ready = [entry[fp] for fp, n in waiting.items() if n == 0 and fp not in apart]
    last = [entry[fp] for fp, n in waiting.items() if n == 0 and fp in apart]
    heapq.heapify(ready)
    heapq.heapify(last)
    start: dict[str, float] = {}
    end: dict[str, float] = {}
    running: list[tuple[float, int, str]] = []
    now, taken = 0.0, 0
    while ready or last or running:
        batch = ready or ([] if running else last)
        while batch and taken + widths.get(batch[0][2], 1) <= (slots if batch is ready else 1):
            _, position, fingerprint = heapq.heappop(batch)
            taken += widths.get(fingerprint, 1)
            start[fingerprint], end[fingerprint] = now, now + durations[fingerprint]
            heapq.heappush(running, (end[fingerprint], position, fingerprint))
        now = running[0][0]
        while running and running[0][0] <= now:
            ended = heapq.heappop(running)[2]
            taken -= widths.get(ended, 1)
            for follower in after[ended]:
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    heapq.heappush(last if follower in apart else ready, entry[follower])
    path = longest_chain(tasks, rank, after)
    return Schedule(now, start, end, path, rank[path[0]] if path else 0.0)


def longest_chain(tasks: Sequence[Node], rank: Mapping[str, float], after: Mapping[str, list[str]]) -> list[str]:
    """The chain of the greatest rank, its beginning first; of equal ones that which comes first in `tasks`."""
    position = {task.fingerprint: i for i, task in enumerate(tasks)}
    path, options = [], list(position)
    while options:
        path.append(min(options, key=lambda fp: (-rank[fp], position[fp])))
        options = after[path[-1]]
    return path
