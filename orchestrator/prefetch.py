"""Brings what a plan needs from the network into the store, on a machine that has one; the sweep then runs where there is none.

It is a run of a part of the plan's tasks, those that read sources, and leaves the trials as they are. What names of the hub
stood for is kept beside the artifacts, so that a plan can be made without asking again.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pare.orchestrator import drive, explain, places, preflight
from pare.orchestrator.board import Board, stderr_console
from pare.orchestrator.config import Experiment
from pare.orchestrator.engine import Engine
from pare.orchestrator.estimate import History
from pare.orchestrator.lease import Leases
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.plan import Plan, Task
from pare.orchestrator.pool import Pool
from pare.orchestrator.segments import Segments
from pare.workers.store import Store

FETCHED = frozenset({"import_model", "adopt", "member", "corpus", "benchmark", "pairs", "tokens", "questions"})
"""Task types that read a source, and those that show that it is enough for what the sweep takes from it."""


def run(
    experiment: Experiment, plan: Plan, device: str, home: Path, command: str, pool: Pool | None = None
) -> tuple[int, dict[str, Any]]:
    """Fetches what is missing. Returns the exit code and what was done, as plain JSON.

    command: what runs the sweep, as the ledger is to keep it.
    """
    console, store = stderr_console(), places.store_of(home, experiment)
    wanted = [task for task in plan.tasks.values() if task.type in FETCHED]
    missing = [task for task in plan.missing(store) if task.type in FETCHED]
    estimates, _ = preflight.forecast(experiment, plan, missing, device, home, History({}, {}))
    preflight.check_feasible(plan, missing, experiment, home, device, estimates)
    with contextlib.closing(Ledger(home, write=True)) as ledger, contextlib.ExitStack() as last:
        if missing:
            explain.remember_code(store.blobs)
        sweep, run_id = drive.begin(experiment, plan, store, ledger, len(plan.tasks) - len(missing), command, only=())
        leases = Leases(store.blobs, ledger.id) if experiment.store.url else None
        if leases:
            last.callback(leases.close)
        segments, state = Segments(ledger, store.blobs, sweep), "interrupted"
        try:
            with drive.engine_pool(pool, missing, experiment, device, home, estimates) as place:
                engine = Engine(
                    plan, store, ledger, run_id, sweep, place, home, device, drive.limits(experiment, fail_fast=False),
                    estimates=estimates, missing=missing, only=(), leases=leases, committed=segments.write,
                )  # fmt: skip
                with Board(plan, len(missing), console) as board, drive.interruptible(engine, board.say):
                    engine.execute(board)
            if not engine.interrupted:
                state = "failed" if engine.failed else "done"
        finally:
            ledger.end_run(run_id, state)
            ledger.commit()
            segments.write(at_once=True)
    places.remember_names(store, plan.names)
    said = [entry(task, store, task in missing, engine.failed.get(task.fingerprint)) for task in wanted]
    code = 128 + engine.interrupted if engine.interrupted else 3 if engine.failed else 0
    commits = {key: known["commit"] for key, known in plan.names.items()}
    return code, {"sweep": sweep, "status": state, "commits": commits, "tasks": said}


def entry(task: Task, store: Store, was_missing: bool, failure: dict[str, Any] | None) -> dict[str, Any]:
    """What became of one task."""
    there = store.has(task.fingerprint)
    state = "failed" if failure else "not reached" if not there else "fetched" if was_missing else "there already"
    manifest = store.manifest(task.fingerprint) if there else {"files": []}
    return {
        "task": task.fingerprint[:12],
        "type": task.type,
        "label": task.label,
        "state": state,
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        **({"message": failure["message"]} if failure else {}),
    }
