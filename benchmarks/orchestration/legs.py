"""What is measured of Pare, a function for each. Every reading has a process of its own:

python -m benchmarks.orchestration.legs NAME ARGUMENT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from benchmarks.orchestration import graphs
from benchmarks.orchestration.driver import SLOTS, drive, drive_tracked, workers
from benchmarks.orchestration.large import large
from pare.orchestrator.plan import Plan
from pare.orchestrator.schedule import schedule

Reading = dict[str, float]
MANY_SLOTS = 4
GRAPHS: dict[str, Callable[[], Plan]] = {"sweep": graphs.sweep, "long_pole": graphs.long_pole}


def pare_tasks(n: str) -> Reading:
    """n trials of one task each on warm workers: `ms` a task; `start_s` is the first start of the workers."""
    with workers() as (home, pool):
        start_s = drive(home, graphs.trivial(25 * SLOTS, "warm"), pool, "warm")
        wall_s = drive(home, graphs.trivial(int(n)), pool, "bench")
    return {"ms": 1e3 * wall_s / int(n), "start_s": start_s}


def pare_tracked(n: str) -> Reading:
    """The same with tracking on: `ms` a trial until MLflow has it all, `sweep_ms` until the sweep itself is done."""
    with workers() as (home, pool):
        drive_tracked(home, graphs.trivial(25 * SLOTS, "warm"), pool, "warm")
        sweep_s, wall_s = drive_tracked(home, graphs.trivial(int(n)), pool, "bench")
    return {"ms": 1e3 * wall_s / int(n), "sweep_ms": 1e3 * sweep_s / int(n)}


def makespan(graph: str) -> Reading:
    """Sleeping tasks on warm workers: `wall_s`, `simulated_s` of the same list schedule without overhead, their `ratio`."""
    plan = GRAPHS[graph]()
    durations = {fp: float(task.spec["seconds"]) for fp, task in plan.tasks.items()}
    simulated = schedule(list(plan.tasks.values()), durations, MANY_SLOTS)
    with workers(MANY_SLOTS) as (home, pool):
        start_s = drive(home, graphs.trivial(25 * MANY_SLOTS, "warm"), pool, "warm")
        wall_s = drive(home, plan, pool, "bench", lambda task: durations[task.fingerprint])
    return {
        "wall_s": wall_s,
        "simulated_s": simulated.makespan_s,
        "ratio": wall_s / simulated.makespan_s,
        "critical_s": simulated.critical_s,
        "work_s": sum(durations.values()),
        "start_s": start_s,
    }


LEGS: dict[str, Callable[[str], Reading]] = {
    "pare_tasks": pare_tasks,
    "pare_tracked": pare_tracked,
    "makespan": makespan,
    "large": lambda n: large(int(n)),
}

if __name__ == "__main__":
    print(json.dumps(LEGS[sys.argv[1]](sys.argv[2])))
