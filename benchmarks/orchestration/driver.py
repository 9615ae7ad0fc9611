"""One driver over a plan made by hand: ledger, store, segments, engine and tracker in the order of `pare run`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.orchestration import peers
from pare.orchestrator import hardware
from pare.orchestrator.engine import Engine, Limits, register
from pare.orchestrator.estimate import Estimate
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.outbox import Tracker, tracking_place
from pare.orchestrator.plan import Plan, Task
from pare.orchestrator.pool import Pool, Reply
from pare.orchestrator.ray_pool import RayPool
from pare.orchestrator.record import trial_uid
from pare.orchestrator.schema import Cluster
from pare.orchestrator.segments import Segments
from pare.workers.store import open_store

SLOTS = peers.SLOTS

ABOUT = {
    "common": {"name": "bench"},
    "base": {"name": "none", "parameters": 0, "bytes": 0},
    "data": "none",
    "evaluation": {"test_tokens": 0, "dtype": "float32", "tolerance": 0.0},
    "hardware": hardware.describe(),
    "versions": {},
}
"""What `pare run` writes down of a sweep as a whole, as far as MLflow is told of it."""


class Quiet:
    """A listener that shows nothing and, where there is a tracker, fills its outbox."""

    def __init__(self, ledger: Ledger, sweep: str, tracked: bool) -> None:
        self.ledger, self.sweep, self.tracked = ledger, sweep, tracked

    def started(self, task: Task, attempt: int) -> None: ...

    def progressed(self, running: dict[str, dict[str, Any] | None]) -> None: ...

    def points(self, task: Task, points: list[tuple[int, dict[str, float]]]) -> None: ...

    def ended(self, task: Task, reply: Reply, final: bool) -> None:
        if not reply["ok"]:
            raise RuntimeError(f"{task.label} {task.fingerprint[:12]}: {reply['failure']}: {reply.get('message')}")

    def elsewhere(self, task: Task, holder: dict[str, Any]) -> None: ...

    def trial_ended(self, trial: str, status: str, failure: dict[str, Any] | None) -> None:
        if self.tracked:
            self.ledger.post(self.sweep, trial_uid(self.sweep, trial), "trial", None)


@contextmanager
def workers(slots: int = SLOTS) -> Iterator[tuple[Path, Pool]]:
    """A home of its own, and a pool on a Ray of its own."""
    with tempfile.TemporaryDirectory() as folder, closing(RayPool(slots, "cpu", Path(folder), Cluster())) as pool:
        yield Path(folder), pool


def drive(home: Path, plan: Plan, pool: Pool, sweep: str, seconds_of: Callable[[Task], float] = lambda task: 0.001) -> float:
    """Seconds from the plan to the last row in the ledger. Raises if a trial is not done.

    seconds_of: what the engine is told that a task will take.
    """
    start = time.perf_counter()
    walk(home, plan, pool, sweep, seconds_of)
    return time.perf_counter() - start


def drive_tracked(home: Path, plan: Plan, pool: Pool, sweep: str) -> tuple[float, float]:
    """(seconds to the last row in the ledger, seconds until MLflow has it all)."""
    start = time.perf_counter()
    tracker = Tracker(home, sweep, open_store(home / "store"), tracking_place(home))
    walk(home, plan, pool, sweep, tracker=tracker)
    done_s = time.perf_counter() - start
    if behind := tracker.finish(None):
        raise RuntimeError(behind)
    return done_s, time.perf_counter() - start


def walk(
    home: Path,
    plan: Plan,
    pool: Pool,
    sweep: str,
    seconds_of: Callable[[Task], float] = lambda task: 0.001,
    tracker: Tracker | None = None,
) -> None:
    store = open_store(home / "store")
    with closing(Ledger(home, write=True)) as ledger:
        missing = plan.missing(store)
        estimates = {task.fingerprint: Estimate(seconds_of(task), 0.0, 0.0, 0.0, 1, source="own") for task in missing}
        register(plan, store, ledger)
        run = ledger.start_run(sweep, sweep, "bench", ABOUT, len(plan.tasks), plan.total_if_separate, 0)
        for position, (name, goals) in enumerate(plan.goals.items()):
            row = {"name": name, "block": name, "recipe": "bench", "overrides": {}, "config": {}, "goals": vars(goals)}
            ledger.put_trial(sweep, position, {**row, "status": "pending", "failure": None})
        segments = Segments(ledger, store.blobs, sweep)
        if tracker:
            ledger.post(sweep, "", "sweep", None)
        ledger.commit()
        if tracker:
            tracker.start()
        engine = Engine(
            plan, store, ledger, run, sweep, pool, home, "cpu", Limits(),
            estimates=estimates,
            missing=missing,
            committed=segments.write,
        )  # fmt: skip
        engine.execute(Quiet(ledger, sweep, tracker is not None))
        ledger.end_run(run, "done")
        ledger.commit()
        segments.write(at_once=True)
        done = ledger.rows("SELECT COUNT(*) FROM trial WHERE sweep = ? AND status = 'done'", sweep)[0][0]
    if done != len(plan.goals):
        raise RuntimeError(f"{done} of {len(plan.goals)} trials are done")
