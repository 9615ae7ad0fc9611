"""One `pare run`: ledger, pool, engine, tracking and report, in this order, and left in good order whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pare import __version__
from pare.orchestrator import hardware, preflight
from pare.orchestrator.board import Board, stderr_console
from pare.orchestrator.config import Experiment, Trial
from pare.orchestrator.engine import Engine, register
from pare.orchestrator.fingerprint import digest, version
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.plan import Plan
from pare.orchestrator.pool import Pool, RayPool
from pare.orchestrator.record import build_record, outcome_digest
from pare.tracking import report as render
from pare.workers.store import Store

SYNC_EVERY_S = 10.0
COLUMN = 56
"""Where the explanations of what to type next begin."""


def run(
    experiment: Experiment,
    plan: Plan,
    device: str,
    home: Path,
    command: str,
    fail_fast: bool = False,
    as_json: bool = False,
    pool: Pool | None = None,
) -> int:
    """Runs what is missing, shows it, reports. Returns the exit code."""
    console = stderr_console()
    store = Store(home / "store")
    missing = plan.missing(store)
    preflight.check_feasible(plan, missing, experiment, home, device)
    ledger = Ledger(home, write=True)
    sweep = sweep_id(experiment)
    try:
        store.remove_dead_attempts()
        register(plan, store, ledger)
        cached = len(plan.tasks) - len(missing)
        run_id = ledger.start_run(
            sweep, experiment.name, command, about(experiment, plan), len(plan.tasks), plan.total_if_separate, cached
        )
        for position, trial in enumerate(experiment.trials):
            ledger.put_trial(sweep, position, trial_row(trial, plan))
        console.print(
            f"sweep [bold]{sweep}[/bold]: {len(experiment.trials)} trials, {len(plan.tasks)} tasks "
            f"({plan.total_if_separate} if each trial ran alone), {cached} need not run, {len(missing)} to run",
            highlight=False,
            soft_wrap=True,
        )
        tracker = Tracker(experiment, home, sweep, store)
        state = "interrupted"
        try:
            with engine_pool(pool, missing, experiment, device, home, plan) as place:
                engine = Engine(
                    plan, store, ledger, run_id, sweep, place, home, device, experiment.cluster.keep_going and not fail_fast
                )
                with Board(plan, len(missing), console, tracker.touch if missing else None) as board:
                    engine.execute(board)
            failed = [t for t in ledger.trials(sweep) if t["status"] != "done" and json.loads(t["goals"])]
            state = "failed" if failed or engine.failed else "done"
        finally:
            ledger.end_run(run_id, state)
            if state == "interrupted":
                tracker.stop()
                console.print(
                    f"\ninterrupted; what is finished is kept. Go on with:\n  {command}", highlight=False, markup=False
                )
        record = build_record(ledger, store, sweep)
        directory = home / "sweeps" / sweep
        fresh = ledger.tracked(sweep) != outcome_digest(record) or not (directory / "report.html").exists()
        if fresh:
            render.write_report(record, directory)
        else:
            (directory / "report.json").write_text(json.dumps(record, indent=1))
        behind = tracker.finish(record, directory, ledger, fresh)
        show(record, directory, as_json)
        if state == "failed":
            return 3
        return 6 if behind else 0
    finally:
        ledger.close()


def sweep_id(experiment: Experiment) -> str:
    """Name and a digest of every trial's resolved config: the same request is the same sweep."""
    return f"{experiment.name}-{digest([[t.name, t.config] for t in experiment.trials])[:8]}"


@contextlib.contextmanager
def engine_pool(
    pool: Pool | None, missing: list[Any], experiment: Experiment, device: str, home: Path, plan: Plan
) -> Iterator[Pool]:
    """The given pool, or a Ray of our own; nothing is started when nothing is missing."""
    if pool is None:
        if not missing:
            yield NoPool()
            return
        pool = RayPool(preflight.slots_for(experiment, device, missing, plan), device, home)
    try:
        yield pool
    finally:
        pool.close()


class NoPool:
    """Stands where nothing is to be run."""

    slots = 0

    def idle(self) -> int:
        return 0

    def submit(self, job: int, requests: list[dict[str, Any]], whole_machine: bool) -> None:
        raise RuntimeError("a task was started although the plan had none missing")

    def wait(self, timeout_s: float) -> list[tuple[int, list[dict[str, Any]]]]:
        return []

    def close(self) -> None:
        pass


class Tracker:
    """Projects the record to MLflow from a thread of its own: a slow or dead server never slows a trial."""

    def __init__(self, experiment: Experiment, home: Path, sweep: str, store: Store) -> None:
        self.enabled = experiment.tracking.enabled
        self.home, self.sweep, self.store = home, sweep, store
        self.place = tracking_place(home, experiment.tracking.uri, experiment.tracking.experiment)
        self.error: str | None = None
        self._dirty, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._started = False
        self._sink: Any = None

    def touch(self) -> None:
        """A trial has ended: its record is worth logging."""
        if not self.enabled:
            return
        self._dirty.set()
        if not self._started:
            self._started = True
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._dirty.set()
        if self._thread.is_alive():
            self._thread.join()

    def finish(self, record: dict[str, Any], directory: Path, ledger: Ledger, fresh: bool) -> bool:
        """The last, complete projection. Returns whether tracking is behind."""
        self.stop()
        if not self.enabled or not fresh:
            return False
        self.error = None
        self._sync(record, directory)
        if self.error:
            stderr_console().print(
                f"tracking is behind: {self.error}\nThe results are safe in the ledger; the same command logs them again.",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            return True
        ledger.set_tracked(self.sweep, outcome_digest(record))
        return False

    def _loop(self) -> None:
        reader = Ledger(self.home)  # SQLite connections belong to one thread
        try:
            while not self._stop.wait(0 if self._dirty.is_set() else SYNC_EVERY_S):
                if self._dirty.is_set():
                    self._dirty.clear()
                    self._sync(build_record(reader, self.store, self.sweep), None)
                    self._stop.wait(SYNC_EVERY_S)
        finally:
            reader.close()

    def _sync(self, record: dict[str, Any], directory: Path | None) -> None:
        from pare.tracking.mlflow_log import MlflowTracker, TrackingError

        uri, artifacts, name = self.place
        try:
            self._sink = self._sink or MlflowTracker(uri, artifacts, name)
            self._sink.sync(record, directory)
        except TrackingError as e:
            self.error = str(e)


def tracking_place(home: Path, uri: str | None = None, experiment: str = "pare") -> tuple[str, Path, str]:
    """(tracking URI, artifact root, experiment name); the environment wins over the config."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI") or uri or "auto",
        (home / "mlartifacts").absolute(),
        os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment,
    )


def about(experiment: Experiment, plan: Plan) -> dict[str, Any]:
    """The part of the record that describes the sweep as a whole."""
    first = experiment.trials[0]
    model = next(iter(plan.models.values()), {})
    return {
        "base": {
            "name": first.model.name or first.model.path,
            "parameters": model.get("n_parameters"),
            "bytes": model.get("n_parameters", 0) * (4 if first.model.dtype == "float32" else 2),
        },
        "data": first.data.name or first.data.path,
        "evaluation": {
            "test_tokens": first.evaluation.windows.sequences * first.evaluation.windows.length,
            "dtype": first.evaluation.dtype,
            "tolerance": first.evaluation.tolerance,
        },
        "hardware": hardware.describe(),
        "versions": {
            "pare": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft", "ray", "mlflow")},
        },
    }


def trial_row(trial: Trial, plan: Plan) -> dict[str, Any]:
    goals = plan.goals.get(trial.name)
    return {
        "name": trial.name,
        "block": trial.block,
        "recipe": trial.recipe,
        "overrides": trial.overrides,
        "config": trial.config,
        "goals": vars(goals) if goals else None,
        "status": "skipped" if trial.skipped else "pending",
        "failure": {"failure": "invalid", "message": trial.skipped, "task": None} if trial.skipped else None,
    }


def program() -> str:
    """What to type to call this program here: `pare` where the shell finds it, else the path that was typed."""
    return "pare" if shutil.which("pare") or not sys.argv[0].endswith("pare") else sys.argv[0]


def show(record: dict[str, Any], directory: Path, as_json: bool) -> None:
    """The table, where the rest lies, and what to type next."""
    if as_json:
        print(json.dumps(record, indent=1))
        return
    from rich.console import Console

    console = Console(width=None if shutil.get_terminal_size((0, 0)).columns else 140)
    console.print(render.terminal(record))
    best = next((t["trial"] for t in record["trials"] if t["pareto"] and t["recipe"] != "base"), None)
    lines = [
        f"report and plots: {directory}/report.html, {directory}/plots/",
        "next:",
        f"  {program()} ui".ljust(COLUMN) + "look at the sweep in MLflow",
        f"  {program()} report --format md".ljust(COLUMN) + "the table as Markdown",
    ]
    if best:
        lines.append(f"  {program()} export {best} --to my-model".ljust(COLUMN) + " take a model from the front away")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
