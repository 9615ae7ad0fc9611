"""A plan of toy tasks, and a way to run them without torch or Ray: what the engine needs and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pare.orchestrator.engine import Engine, Limits, register
from pare.orchestrator.fingerprint import digest
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.plan import Goals, Plan, Task
from pare.orchestrator.pool import InlinePool, Room
from pare.workers.store import ArtifactError, Store


def toy_plan(trials: tuple[str, ...] = ("a", "b"), asked: tuple[str, ...] = ()) -> Plan:
    """import -> compress (per trial) -> export -> evaluate, with one speed task per trial; import is shared.

    asked: trials whose evaluation needs questions, which they share.
    """
    plan = Plan()
    for name in trials:
        own: list[str] = []

        def add(kind: str, label: str, inputs: dict[str, str], name: str = name, own: list[str] = own) -> str:
            spec = {"threads": 1} if kind == "speed" else {"label": label}
            fingerprint = digest([kind, label, inputs])
            task = plan.tasks.setdefault(fingerprint, Task(fingerprint, kind, label, spec, {}, inputs, {}))
            task.trials.append(name)
            own.append(fingerprint)
            return fingerprint

        base = add("import_model", "import", {})
        artifact = add("compress", f"compress {name}", {"model": base})
        export = add("export", f"export {name}", {"model": artifact})
        questions = {"questions": add("questions", "questions", {})} if name in asked else {}
        evaluate = add("evaluate", f"evaluate {name}", {"export": export, **questions})
        speed = add("speed", f"speed {name}", {"export": export})
        plan.goals[name] = Goals(artifact, artifact, export, evaluate, speed, own)
    return plan


class Toy:
    """Runs toy tasks into a store. `fail[label]` is a list of failures to give, one per attempt."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ran: list[str] = []
        self.batches: list[list[str]] = []
        self.fail: dict[str, list[str]] = {}
        self.die_at: str | None = None
        self.wall_s = 1.0
        self.halvings: dict[str, list[int]] = {}
        self.rooms: dict[str, list[Room]] = {}

    def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.batches.append([r["label"] for r in requests])
        return [self.one(r) for r in requests]

    def one(self, request: dict[str, Any]) -> dict[str, Any]:
        label = request["label"]
        if label == self.die_at:
            raise KeyboardInterrupt
        self.ran.append(label)
        self.halvings.setdefault(label, []).append(request.get("where", {}).get("halvings", 0))
        failures = self.fail.get(label, [])
        if failures:
            return {"ok": False, "failure": failures.pop(0), "message": "as told", "cost": {}}
        try:
            for fingerprint in request["inputs"].values():
                self.store.open(fingerprint)
        except ArtifactError as e:
            return {"ok": False, "failure": "corrupt_input", "message": str(e), "artifact": e.fingerprint, "cost": {}}
        with self.store.attempt() as out:
            (out / "value.txt").write_text(label)
            manifest, _ = self.store.publish(
                out, request["fingerprint"], request["type"], {"quality/ppl": 1.0}, {"wall_s": self.wall_s}
            )
        return {"ok": True, "digest": manifest["digest"], "result": manifest["result"], "cost": manifest["cost"]}

    def times(self) -> Counter[str]:
        return Counter(self.ran)


class ToyPool(InlinePool):
    """Remembers what room a task was given."""

    def __init__(self, toy: Toy) -> None:
        super().__init__(toy)
        self.toy = toy

    def submit(self, job: int, requests: list[dict[str, Any]], room: Room, behind: int | None = None) -> None:
        for request in requests:
            self.toy.rooms.setdefault(request["label"], []).append(room)
        super().submit(job, requests, room, behind)


class Silent:
    """A listener that remembers how trials ended."""

    def __init__(self) -> None:
        self.trials: dict[str, str] = {}

    def started(self, task: Task, attempt: int) -> None: ...

    def progressed(self, running: dict[str, dict[str, Any] | None]) -> None: ...

    def points(self, task: Task, points: list[tuple[int, dict[str, float]]]) -> None: ...

    def ended(self, task: Task, reply: dict[str, Any], final: bool) -> None: ...

    def elsewhere(self, task: Task, holder: dict[str, Any]) -> None: ...

    def trial_ended(self, trial: str, status: str, failure: dict[str, Any] | None) -> None:
        self.trials[trial] = status


def execute(
    home: Path, plan: Plan, toy: Toy, keep_going: bool = True, pool: type[ToyPool] = ToyPool
) -> tuple[Engine, Silent, Ledger]:
    """One driver's life over a plan; the ledger is left open for the test to read."""
    ledger = Ledger(home, write=True)
    register(plan, toy.store, ledger)
    run = ledger.start_run("toy", "toy", "pare run toy", {}, len(plan.tasks), plan.total_if_separate, 0)
    for position, (name, goals) in enumerate(plan.goals.items()):
        row = {"name": name, "block": name, "recipe": name, "overrides": {}, "config": {}, "goals": vars(goals)}
        ledger.put_trial("toy", position, {**row, "status": "pending", "failure": None})
    engine = Engine(plan, toy.store, ledger, run, "toy", pool(toy), home, "cpu", Limits(keep_going))
    listener = Silent()
    try:
        engine.execute(listener)
    except KeyboardInterrupt:
        ledger.close()
        raise
    return engine, listener, ledger
