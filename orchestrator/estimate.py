"""What a task will cost before it has run: time, memory and disk from its work, corrected by what its likes have cost.

A task that has run before costs what it did. Else the nearest known tasks of its kind (type, methods, device, model) are
taken, and what they cost is multiplied by the ratio of the works. Where nothing like it is known the work itself is all
there is, at the speed of this machine.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pare.orchestrator.explain import Leaves, leaves
from pare.orchestrator.fingerprint import DEPENDS_ON_DEVICE, canonical
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.machine import Machine, machine
from pare.orchestrator.plan import Plan, Task, ranks_of
from pare.orchestrator.work import CONTEXT, LIBRARIES, UNKNOWN, WORK, Job, Made, Record, Shape, Work, made_by

REMEMBERED = 5000
"""Tasks of the ledger that are looked at, the latest first."""

COMPARED = 64
"""Known tasks of a kind that a new one is compared with, the latest first."""

TOGETHER = frozenset({"speed"})
"""Task types that take every slot, measured together; their costs are one export's share."""

SPREAD = frozenset({"allocate"})
"""Task types whose probes run on as many slots as there are."""

Cost = Mapping[str, float]
"""Of an attempt: `wall_s`, `cpu_s`, `memory_start_bytes`, `peak_rss_bytes`, `disk_bytes`, and on a GPU `peak_gpu_bytes`."""


@dataclass(frozen=True)
class Estimate:
    wall_s: float
    peak_bytes: float
    """Host memory at the peak, libraries included."""
    disk_bytes: float
    gpu_s: float
    slots: int
    """Slots it takes while it runs."""
    gpu_bytes: float = 0.0
    source: str = "shape"
    """Where it comes from: the model's "shape" alone, tasks "like" it, or its "own" earlier run."""


@dataclass(frozen=True)
class View:
    """A task seen through its record and those of its inputs: what decides its cost."""

    record: Record
    model: str
    """The imported model at the bottom, by what it is; empty where there is none."""
    methods: tuple[str, ...]
    """What was done to the model, the latest first; of a task that makes a model, its own method included."""
    made: Made
    work: Work

    @property
    def kinds(self) -> tuple[Any, Any]:
        """Tasks of the first equal kind are alike; for a type without a method of its own the second will do, too."""
        of_type = (self.record["type"], self.record.get("device"), self.model)
        return (*of_type, self.methods), (*of_type, (self.record["spec"].get("method") or "",))


class History:
    """What tasks have cost, and the records by which they are compared."""

    def __init__(
        self, costs: Mapping[str, Cost], records: Mapping[str, Record], fetch: Callable[[str], Record | None] = lambda fp: None
    ) -> None:
        """costs, records: fingerprint -> cost and record, the latest first; fetch: the record of a task that is not there."""
        self.costs, self.records, self._fetch = costs, dict(records), fetch

    @classmethod
    def read(cls, ledger: Ledger | None) -> History:
        """From a ledger's finished tasks; without one nothing is known."""
        if ledger is None:
            return cls({}, {})
        query = "SELECT fingerprint, record, cost FROM task WHERE status = 'done' ORDER BY finished DESC LIMIT ?"
        rows = ledger.rows(query, REMEMBERED)

        def fetch(fingerprint: str) -> Record | None:
            found = ledger.rows("SELECT record FROM task WHERE fingerprint = ?", fingerprint)
            return json.loads(found[0]["record"]) if found else None

        costs = {row["fingerprint"]: json.loads(row["cost"]) for row in rows if row["cost"]}
        return cls(costs, {row["fingerprint"]: json.loads(row["record"]) for row in rows}, fetch)

    def record(self, fingerprint: str) -> Record | None:
        if fingerprint not in self.records and (found := self._fetch(fingerprint)):
            self.records[fingerprint] = found
        return self.records.get(fingerprint)


class Estimator:
    """Estimates the tasks of one plan on one kind of device."""

    def __init__(self, plan: Plan, history: History, device: str, slots: int, speed: Machine | None = None) -> None:
        """speed: of one slot; measured here where it is not given."""
        self.plan, self.history, self.device, self.slots, self._speed = plan, history, device, slots, speed
        self._shapes = {
            canonical(plan.tasks[fp].spec): Shape.of(known) for fp, known in plan.models.items() if fp in plan.tasks
        }
        self._views: dict[str, View | None] = {}
        self._known_leaves: dict[str, Leaves] = {}
        self._likes: dict[Any, list[str]] = {}
        for fingerprint in history.costs:
            view = self.view(fingerprint)
            for kind in dict.fromkeys(view.kinds) if view else ():
                members = self._likes.setdefault(kind, [])
                if len(members) < COMPARED:
                    members.append(fingerprint)

    def estimates(self, tasks: Iterable[Task] | None = None) -> dict[str, Estimate]:
        """Fingerprint -> estimate, for the given tasks or the whole plan."""
        return {task.fingerprint: self.estimate(task) for task in (self.plan.tasks.values() if tasks is None else tasks)}

    def estimate(self, task: Task) -> Estimate:
        view = self.view(task.fingerprint)
        assert view is not None  # every task of the plan has a view
        on_gpu = self.device == "cuda" and task.type in DEPENDS_ON_DEVICE
        wall, peak, disk = self.seconds(view), ranks_of(task) * (LIBRARIES + view.work.memory), view.work.disk
        gpu_bytes = view.work.memory if on_gpu else 0.0
        if task.type in TOGETHER:
            peak -= LIBRARIES
        elif on_gpu:
            peak = ranks_of(task) * (LIBRARIES + CONTEXT + view.work.memory / 2)
        source = "shape"
        likes = self.likes(task.fingerprint, view)
        if likes:
            source = "own" if likes == [task.fingerprint] else "like"
            known = [(self.history.costs[fp], self.view(fp)) for fp in likes]
            wall = median([c["wall_s"] * ratio(self.seconds(view), self.seconds(v)) for c, v in known if v], wall)
            peak = median([scaled_peak(c, ratio(view.work.memory, v.work.memory)) for c, v in known if v], peak)
            disk = median([scaled(c, "disk_bytes", ratio(disk, v.work.disk)) for c, v in known if v], disk)
            if on_gpu:
                more = [scaled(c, "peak_gpu_bytes", ratio(view.work.memory, v.work.memory)) for c, v in known if v]
                gpu_bytes = median(more, gpu_bytes)
        count = ranks_of(task)
        slots = self.slots if task.type in TOGETHER | SPREAD else count
        return Estimate(wall, peak, disk, wall * count if on_gpu else 0.0, slots, gpu_bytes, source)

    def seconds(self, view: View) -> float:
        """What the work alone says."""
        device = self.device if view.record["type"] in DEPENDS_ON_DEVICE else "cpu"
        seconds = view.work.seconds(self._speed or machine(device), view.record["spec"].get("dtype", "float32"))
        return seconds / (self.slots if view.record["type"] in SPREAD else view.record["spec"].get("ranks", 1))

    def likes(self, fingerprint: str, view: View) -> list[str]:
        """The known tasks nearest to a task: itself, or those of its kind that differ from it in the fewest leaves."""
        if fingerprint in self.history.costs:
            return [fingerprint]
        members = next((self._likes[kind] for kind in view.kinds if kind in self._likes), [])
        if len(members) < 2:
            return members
        own = self._leaves(view)
        distance = {fp: len(self._leaves_of_known(fp, v) ^ own) for fp in members if (v := self.view(fp))}
        least = min(distance.values(), default=0)
        return [fp for fp, d in distance.items() if d == least]

    def view(self, fingerprint: str) -> View | None:
        """None where the task is not known any more."""
        if fingerprint not in self._views:
            task = self.plan.tasks.get(fingerprint)
            if task:
                device = self.device if task.type in DEPENDS_ON_DEVICE else None
                record: Record | None = {"type": task.type, "spec": task.spec, "inputs": task.inputs, "device": device}
            else:
                record = self.history.record(fingerprint)
            self._views[fingerprint] = self._look(record) if record else None
        return self._views[fingerprint]

    def _look(self, record: Record) -> View:
        spec = {name: value for name, value in record["spec"].items() if name != "card"}
        inputs = {role: seen for role, fp in record["inputs"].items() if (seen := self.view(fp))}
        beneath = inputs.get("model") or inputs.get("export")
        model = canonical(spec) if record["type"] == "import_model" else beneath.model if beneath else ""
        own = (spec["method"],) if "method" in spec else ()
        shape = self._shapes.get(model, Shape())
        job = Job(record, shape, {role: v.record for role, v in inputs.items()}, {role: v.made for role, v in inputs.items()})
        work = WORK[record["type"]](job) if record["type"] in WORK else UNKNOWN
        return View(record, model, own + (beneath.methods if beneath else ()), made_by(job), work)

    def _leaves_of_known(self, fingerprint: str, view: View) -> Leaves:
        if fingerprint not in self._known_leaves:
            self._known_leaves[fingerprint] = self._leaves(view)
        return self._known_leaves[fingerprint]

    def _leaves(self, view: View) -> Leaves:
        """What decides a task's cost, of its own spec and of the models and windows beneath it.

        Not kept for new tasks: those of ten thousand trials would fill a gigabyte.
        """
        found = set(leaves({name: value for name, value in view.record["spec"].items() if name != "card"}))
        for role, fingerprint in view.record["inputs"].items():
            if seen := self.view(fingerprint):
                found.add((f"inputs.{role}", seen.record["type"]))
                if role in ("model", "export", "tokens", "questions"):
                    found |= {(f"{role}.{path}", value) for path, value in self._leaves(seen)}
        return frozenset(found)


def ratio(new: float, old: float) -> float:
    return new / old if old > 0 else 1.0


def scaled(cost: Cost, name: str, factor: float) -> float | None:
    """None where the cost does not say."""
    return cost[name] * factor if name in cost else None


def scaled_peak(cost: Cost, factor: float) -> float | None:
    """Memory at the start of a task does not grow with its work. A peak without a start is that of a process's whole life."""
    if "memory_start_bytes" not in cost:
        return None
    start = cost["memory_start_bytes"]
    return start + (cost["peak_rss_bytes"] - start) * factor


def median(values: Iterable[float | None], otherwise: float) -> float:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else otherwise


def accuracy(estimates: Mapping[str, Estimate], costs: Mapping[str, Cost]) -> dict[str, Any]:
    """How near the estimates of the tasks that ran came to what they cost."""
    pairs = [(estimates[fp], cost) for fp, cost in costs.items() if fp in estimates]
    if not pairs:
        return {"tasks": 0}
    measured = sum(cost["wall_s"] for _, cost in pairs)
    peaks = [e.peak_bytes / cost["peak_rss_bytes"] for e, cost in pairs if "memory_start_bytes" in cost]
    written = sum(cost.get("disk_bytes", 0.0) for _, cost in pairs)
    return {
        "tasks": len(pairs),
        "estimated_s": sum(e.wall_s for e, _ in pairs),
        "measured_s": measured,
        "time_ratio": ratio(sum(e.wall_s for e, _ in pairs), measured),
        "waiting": ratio(measured, sum(cost["cpu_s"] for _, cost in pairs)),
        "peak_within_15_percent": sum(abs(p - 1) <= 0.15 for p in peaks) / len(peaks) if peaks else None,
        "disk_ratio": ratio(sum(e.disk_bytes for e, _ in pairs), written) if written else None,
        "from": {source: sum(e.source == source for e, _ in pairs) for source in ("own", "like", "shape")},
    }
