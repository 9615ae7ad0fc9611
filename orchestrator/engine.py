"""The ready loop: starts what can run, takes in what came back, decides about another attempt.

The driver owns it all. Ray is only where tasks run; the store says what is done; the ledger writes down what happened.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from pare.orchestrator.fingerprint import DEPENDS_ON_DEVICE, canonical
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.plan import Plan, Task
from pare.orchestrator.pool import Pool, Reply
from pare.workers.store import Store

RETRIES = {
    "lost_worker": 3,
    "oom_host": 1,
    "oom_gpu": 1,
    "corrupt_input": 1,
    "unknown": 1,
    "user_error": 0,
    "nonfinite": 0,
    "export_mismatch": 0,
    "disk_full": 0,
}
"""Failure class -> further attempts. A deterministic failure gets none: it would fail again."""

ALONE = frozenset({"speed"})
"""Task types that take the whole machine, together with their likes, after everything else."""

WAIT_S = 0.25


class Listener(Protocol):
    """Told what happens, to show it."""

    def started(self, task: Task, attempt: int) -> None: ...

    def progressed(self, running: dict[str, dict[str, Any] | None]) -> None: ...

    def ended(self, task: Task, reply: Reply, final: bool) -> None: ...

    def trial_ended(self, trial: str, status: str, failure: dict[str, Any] | None) -> None: ...


class Engine:
    """Executes one plan."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        ledger: Ledger,
        run: int,
        sweep: str,
        pool: Pool,
        home: Path,
        device: str,
        keep_going: bool,
    ) -> None:
        self.plan, self.store, self.ledger, self.run, self.sweep = plan, store, ledger, run, sweep
        self.pool, self.home, self.device, self.keep_going = pool, home, device, keep_going
        self.missing = {task.fingerprint: task for task in plan.missing(store)}
        self.failed: dict[str, dict[str, Any]] = {}
        self.failures: Counter[tuple[str, str]] = Counter()
        self.running: dict[int, list[Task]] = {}
        self.attempts: dict[str, int] = {}
        self.settled: set[str] = set()
        self.jobs = 0
        self.stopping = False

    def execute(self, listener: Listener) -> None:
        """Runs until nothing is left to start and nothing runs. Failed tasks fail their trials, not the sweep."""
        self.settle(listener)
        while True:
            self.start(listener)
            if not self.running:
                break
            for job, replies in self.pool.wait(WAIT_S):
                self.take_in(job, replies, listener)
            listener.progressed({task.fingerprint: self.live(task) for tasks in self.running.values() for task in tasks})
        self.settle(listener)

    def start(self, listener: Listener) -> None:
        """Hands ready tasks to free slots, in the order of the plan; tasks that run alone come last."""
        if self.stopping:
            return
        busy = {task.fingerprint for tasks in self.running.values() for task in tasks}
        waiting = [t for fp, t in self.missing.items() if fp not in busy and fp not in self.failed and not self.blocked(t)]
        for task in waiting:
            if self.pool.idle() < 1:
                return
            if task.type not in ALONE and self.ready(task):
                self.launch([task], listener)
        if self.running or any(task.type not in ALONE for task in waiting):
            return
        batches: dict[str, list[Task]] = {}
        for task in waiting:
            batches.setdefault(canonical([task.type, task.spec]), []).append(task)
        if batches:
            self.launch(next(iter(batches.values())), listener)

    def launch(self, tasks: list[Task], listener: Listener) -> None:
        alone = tasks[0].type in ALONE
        requests = [
            {
                "fingerprint": task.fingerprint,
                "type": task.type,
                "label": task.label,
                "spec": task.spec,
                "where": task.where,
                "inputs": task.inputs,
                "store": str(self.store.root.absolute()),
                "device": self.device if task.type in DEPENDS_ON_DEVICE else "cpu",
                "threads": task.spec["threads"] if alone else 1,
                "log": str(self.log(task).absolute()),
                "live": str((self.home / "live" / task.fingerprint).absolute()),
            }
            for task in tasks
        ]
        (self.home / "live").mkdir(exist_ok=True)
        self.jobs += 1
        self.running[self.jobs] = tasks
        for task in tasks:
            self.attempts[task.fingerprint] = self.ledger.start_attempt(task.fingerprint, self.run)
            listener.started(task, sum(n for (fp, _), n in self.failures.items() if fp == task.fingerprint) + 1)
        for trial in {name for task in tasks for name in task.trials} - self.settled:
            self.ledger.set_trial(self.sweep, trial, "running")
        self.pool.submit(self.jobs, requests, whole_machine=alone)

    def take_in(self, job: int, replies: list[Reply], listener: Listener) -> None:
        """Writes down how a job ended. A worker that died gives one reply for all its tasks."""
        tasks = self.running.pop(job)
        if len(replies) != len(tasks):
            replies = replies * len(tasks)
        for task, given in zip(tasks, replies, strict=True):
            reply = {**given, "fingerprint": task.fingerprint}
            self.ledger.end_attempt(self.attempts.pop(task.fingerprint), self.run, reply)
            (self.home / "live" / task.fingerprint).unlink(missing_ok=True)
            final = True
            if reply["ok"]:
                self.missing.pop(task.fingerprint, None)
            else:
                final = not self.again(task, reply)
            listener.ended(task, reply, final)
        self.settle(listener)

    def again(self, task: Task, reply: Reply) -> bool:
        """Whether the task gets another attempt. A damaged input is made anew first."""
        failure = reply["failure"]
        self.failures[task.fingerprint, failure] += 1
        if self.failures[task.fingerprint, failure] <= RETRIES.get(failure, 0):
            if failure == "corrupt_input":
                self.missing = {t.fingerprint: t for t in self.plan.missing(self.store)}
            return True
        message = f"{reply.get('message', '')} (log: {self.log(task)})"
        self.failed[task.fingerprint] = {"failure": failure, "message": message, "task": task.label}
        if not self.keep_going:
            self.stopping = True
        return False

    def ready(self, task: Task) -> bool:
        return all(fp not in self.missing for fp in task.inputs.values())

    def blocked(self, task: Task) -> bool:
        """Whether something that the task needs, however far up, has failed for good."""
        return self.cause(task.fingerprint) is not None

    def cause(self, fingerprint: str) -> dict[str, Any] | None:
        """The failure that keeps a task from being done, if any."""
        if fingerprint in self.failed:
            return self.failed[fingerprint]
        if fingerprint not in self.missing:
            return None
        return next((c for fp in self.plan.tasks[fingerprint].inputs.values() if (c := self.cause(fp))), None)

    def settle(self, listener: Listener) -> None:
        """Marks trials that are done or can no longer be done."""
        for trial, goals in self.plan.goals.items():
            if trial in self.settled:
                continue
            ends = [fp for fp in (goals.export, goals.evaluate) if fp]
            cause = next((c for fp in ends if (c := self.cause(fp))), None)
            if cause:
                status = "failed"
            elif all(fp not in self.missing for fp in ends):
                status = "done"
            else:
                continue
            self.settled.add(trial)
            self.ledger.set_trial(self.sweep, trial, status, cause)
            listener.trial_ended(trial, status, cause)

    def log(self, task: Task) -> Path:
        return self.home / "logs" / f"{task.fingerprint[:12]}.log"

    def live(self, task: Task) -> dict[str, Any] | None:
        """How far a running task says it is."""
        try:
            return dict(json.loads((self.home / "live" / task.fingerprint).read_text()))
        except (FileNotFoundError, ValueError):
            return None


def register(plan: Plan, store: Store, ledger: Ledger) -> None:
    """Writes the plan's tasks into the ledger; results that are in the store but not in the ledger are copied over."""
    known = ledger.tasks(list(plan.tasks))
    for fingerprint, task in plan.tasks.items():
        row = known.get(fingerprint)
        present = store.has(fingerprint)
        if row is not None and row["status"] == "done" and present:
            continue
        ledger.put_task(fingerprint, task.type, task.label, task.record, "done" if present else "pending")
        if present:
            manifest = store.manifest(fingerprint)
            ledger.put_result(fingerprint, manifest["digest"], manifest["result"], manifest["cost"])
