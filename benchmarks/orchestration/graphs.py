"""Plans made by hand, of tasks that need no model."""

from __future__ import annotations

import random
from collections.abc import Iterable

from pare.orchestrator.fingerprint import digest
from pare.orchestrator.plan import Goals, Plan, Task

NOTHING, SLEEPING = "benchmarks.orchestration.nothing", "benchmarks.orchestration.sleeping"


def task(kind: str, spec: dict[str, object], inputs: Iterable[str] = ()) -> Task:
    """A task whose record is about as long as a real one's."""
    named = {f"input.{i}": fingerprint for i, fingerprint in enumerate(inputs)}
    record = {"type": kind, "spec": spec, "inputs": named, "libraries": {"torch": "0", "transformers": "0"}, "code": "0" * 64}
    return Task(digest(record), kind, kind.rpartition(".")[2], spec, {}, named, record)


def plan_of(trials: dict[str, list[Task]]) -> Plan:
    """A plan of trials, each given by its tasks, producers first; the last one is what the trial is run for."""
    plan = Plan()
    for name, tasks in trials.items():
        for own in tasks:
            plan.tasks.setdefault(own.fingerprint, own).trials.append(name)
        last = tasks[-1].fingerprint
        plan.goals[name] = Goals(last, last, last, last, None, [own.fingerprint for own in tasks])
    return plan


def trivial(n: int, salt: str = "") -> Plan:
    """n trials of one task that does nothing."""
    return plan_of({f"{salt}{i}": [task(NOTHING, {"number": i, "salt": salt})] for i in range(n)})


def sweep(choices: int = 3, stages: int = 3, salt: str = "") -> Plan:
    """Every choice at every stage: choices + choices^2 + ... sleeping tasks of 1 to 2 s; a trial for each way through."""
    drawn = random.Random(0)
    ways: dict[str, list[Task]] = {"": []}
    for stage in range(stages):
        longer = {}
        for name, tasks in ways.items():
            for choice in range(choices):
                spec = {"stage": stage, "choice": choice, "salt": salt, "seconds": round(drawn.uniform(1.0, 2.0), 2)}
                longer[f"{name}{choice}"] = [*tasks, task(SLEEPING, spec, [t.fingerprint for t in tasks[-1:]])]
        ways = longer
    return plan_of(ways)


def long_pole(n: int = 24, links: int = 5, salt: str = "") -> Plan:
    """An irregular graph: a chain of `links` long tasks, which is the last to be named, beside n tasks of 1 to 2 s that each
    read up to two of those before them."""
    drawn = random.Random(1)
    beside: list[Task] = []
    above: list[list[Task]] = []
    for i in range(n):
        picks = sorted(drawn.sample(range(i), min(i, drawn.choice((0, 1, 1, 2)))))
        spec = {"number": i, "salt": salt, "seconds": round(drawn.uniform(1.0, 2.0), 2)}
        beside.append(task(SLEEPING, spec, [beside[p].fingerprint for p in picks]))
        needed = {own.fingerprint: own for p in picks for own in above[p]}
        above.append([*needed.values(), beside[i]])
    chain: list[Task] = []
    for i in range(links):
        spec = {"link": i, "salt": salt, "seconds": round(drawn.uniform(2.0, 2.5), 2)}
        chain.append(task(SLEEPING, spec, [t.fingerprint for t in chain[-1:]]))
    return plan_of({f"t{i}": tasks for i, tasks in enumerate(above)} | {"pole": chain})
