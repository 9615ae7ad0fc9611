"""One `pare run`: ledger, pool, engine, tracking and report, in this order, and left in good order whatever happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from pare import __version__
from pare.orchestrator import explain, hardware, preflight, upkeep
from pare.orchestrator.board import Board, stderr_console
from pare.orchestrator.config import Experiment, Trial
from pare.orchestrator.engine import Engine, Limits, register
from pare.orchestrator.errors import BusyError
from pare.orchestrator.estimate import Estimate, History
from pare.orchestrator.fingerprint import digest, version
from pare.orchestrator.lease import Leases
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.outbox import Tracker, place_to_keep, tracking_place
from pare.orchestrator.places import ledger_if_any, store_of
from pare.orchestrator.plan import Plan, Task
from pare.orchestrator.pool import InlinePool, Pool
from pare.orchestrator.ray_pool import RayPool
from pare.orchestrator.record import build_record, outcome_digest, trial_uid
from pare.orchestrator.segments import Segments
from pare.tracking import report as render
from pare.tracking.units import protocol
from pare.workers.store import Store

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
    only: Collection[str] | None = None,
    again: Collection[str] = (),
) -> int:
    """Runs what is missing, shows it, reports. Returns the exit code.

    only: names of the trials to work on; the others stay as they are (None: all). again: tasks to run although they are done.
    """
    console = stderr_console()
    store = store_of(home, experiment)
    plan.answer(store)
    missing = plan.missing(store, only, again)
    with contextlib.ExitStack() as stack:
        known_costs = ledger_if_any(home)
        if known_costs:
            stack.callback(known_costs.close)
        estimates, _ = preflight.forecast(
            experiment, plan, [*missing, *plan.expected()], device, home, History.read(known_costs)
        )
    preflight.check_feasible(plan, missing, experiment, home, device, estimates)
    with contextlib.closing(Ledger(home, write=True)) as ledger:
        leases = Leases(store.blobs, ledger.id) if experiment.store.url else None
        if leases:
            refuse_busy([plan.tasks[fp] for fp in again], leases)
        cached = sum(not task.late for task in plan.tasks.values()) - len(missing)
        if missing:
            explain.remember_code(store.blobs)
        sweep, run_id = begin(experiment, plan, store, ledger, cached, command, only)
        console.print(
            f"sweep [bold]{sweep}[/bold]: {len(experiment.trials)} trials, {len(plan.tasks)} tasks "
            f"({plan.total_if_separate} if each trial ran alone), {cached} need not run, {len(missing)} to run",
            highlight=False,
            soft_wrap=True,
        )
        tracking = experiment.tracking
        place_of = tracking_place(home, tracking.uri, tracking.experiment)
        tracker = Tracker(home, sweep, store, place_of, tracking.enabled)
        segments = Segments(ledger, store.blobs, sweep)
        state, code, reason = "interrupted", 0, "interrupted"
        try:
            with engine_pool(pool, missing, experiment, device, home, estimates) as place:
                engine = Engine(
                    plan, store, ledger, run_id, sweep, place, home, device, limits(experiment, fail_fast),
                    estimates=estimates,
                    missing=missing,
                    only=only,
                    again=again,
                    leases=leases,
                    committed=segments.write,
                )  # fmt: skip
                if missing:
                    tracker.start()
                with Telling(ledger, sweep, plan, len(missing), console) as board, interruptible(engine, board.say):
                    engine.execute(board)
            if engine.stopping and engine.missing:
                reason = engine.stopping
                code = 128 + engine.interrupted if engine.interrupted else 3 if engine.failed else 5
            else:
                failed = engine.failed or any(trial["status"] == "failed" for trial in ledger.trials(sweep))
                state = "failed" if failed else "done"
        finally:
            if state == "interrupted":
                console.print(f"\n{reason}; what is finished is kept. Go on with:\n  {command}", highlight=False, markup=False)
            ledger.end_run(run_id, state)
            ledger.commit()
            if leases:
                leases.close()
            segments.write(at_once=True)
        if code in (130, 143):
            return code
        behind = conclude(experiment, store, ledger, sweep, home, tracker, console, as_json)
        return code or (3 if state == "failed" else 6 if behind else 0)


def begin(
    experiment: Experiment,
    plan: Plan,
    store: Store,
    ledger: Ledger,
    cached: int,
    command: str,
    only: Collection[str] | None,
) -> tuple[str, int]:
    """Writes into the ledger what is going to happen; so many tasks need not run. Returns (sweep, run)."""
    sweep = sweep_id(experiment)
    store.remove_dead_attempts()
    register(plan, store, ledger)
    described = about(experiment, plan)
    run = ledger.start_run(sweep, experiment.name, command, described, len(plan.tasks), plan.total_if_separate, cached)
    known = {row["name"] for row in ledger.trials(sweep)} if only is not None else set()
    for position, trial in enumerate(experiment.trials):
        if only is None or trial.name in only or trial.name not in known:
            ledger.put_trial(sweep, position, trial_row(trial, plan))
    ledger.post(sweep, "", "sweep", None)
    ledger.commit()
    return sweep, run


def conclude(
    experiment: Experiment,
    store: Store,
    ledger: Ledger,
    sweep: str,
    home: Path,
    tracker: Tracker,
    console: Console,
    as_json: bool,
) -> str | None:
    """Report, tracking, what is to be printed and what may be freed. Returns what to tell if tracking is behind."""
    record = build_record(ledger, store, sweep)
    directory = home / "sweeps" / sweep
    fresh = ledger.tracked(sweep) != outcome_digest(record) or not (directory / "report.html").exists()
    if fresh:
        render.write_report(record, directory)
    else:
        render.write_json(record, directory)
    behind = tracker.finish(record, say=lambda line: console.print(line, highlight=False)) if fresh else None
    if not behind:
        ledger.set_tracked(sweep, outcome_digest(record))
    show(record, directory, as_json)
    if freed := upkeep.after_run(ledger, store, experiment, record):
        console.print(freed, highlight=False, markup=False)
    if behind:
        console.print(behind, highlight=False, markup=False, soft_wrap=True)
    return behind


def refuse_busy(tasks: list[Task], leases: Leases) -> None:
    """What is to run again must not be in the hands of another driver: its result would not be this run's."""
    for task in tasks:
        if not leases.take(task.fingerprint) and (holder := leases.holder(task.fingerprint)):
            leases.close()
            raise BusyError(
                f"'{task.label}' is being made by another driver, process {holder['pid']} on {holder['name']}. Wait for it, or "
                "stop it there (pare stop)"
            )


def limits(experiment: Experiment, fail_fast: bool) -> Limits:
    cluster, budget = experiment.cluster, experiment.budget
    return Limits(
        cluster.keep_going and not fail_fast,
        cluster.stall_s,
        cluster.pending_s,
        budget.wall_s,
        budget.gpu_hours,
        budget.trials,
    )


def sweep_id(experiment: Experiment) -> str:
    """Name and a digest of every trial's resolved config: the same request is the same sweep."""
    return f"{experiment.name}-{digest([[t.name, t.config] for t in experiment.trials])[:8]}"


@contextlib.contextmanager
def engine_pool(
    pool: Pool | None,
    missing: list[Task],
    experiment: Experiment,
    device: str,
    home: Path,
    estimates: Mapping[str, Estimate],
) -> Iterator[Pool]:
    """The given pool, or a Ray of our own; nothing is started when nothing is missing."""
    if pool is None:
        if not missing:
            yield InlinePool(slots=0)
            return
        slots = preflight.slots_for(experiment, device, missing, estimates)
        pool = RayPool(slots, device, home, experiment.cluster)
    try:
        yield pool
    finally:
        pool.close()


class Telling(Board):
    """The board, which also puts into the outbox what MLflow is to be told."""

    def __init__(self, ledger: Ledger, sweep: str, plan: Plan, n_missing: int, console: Console) -> None:
        super().__init__(plan, n_missing, console)
        self.ledger, self.sweep = ledger, sweep

    def points(self, task: Task, points: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in points:
            for name, value in values.items():
                for trial in task.trials:
                    body = {"name": f"{CURVES.get(task.type, task.type)}/{name}", "step": step, "value": value}
                    self.ledger.post(self.sweep, trial_uid(self.sweep, trial), "point", body)

    def trial_ended(self, trial: str, status: str, failure: dict[str, Any] | None) -> None:
        super().trial_ended(trial, status, failure)
        self.ledger.post(self.sweep, trial_uid(self.sweep, trial), "trial", None)


CURVES = {"allocate": "search"}
"""Task type -> what the names of its curves begin with, where that is not the type."""


@contextlib.contextmanager
def interruptible(engine: Engine, say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM once: running tasks save their state and the sweep stops. Twice: at once, by force."""

    def asked(number: int, _frame: FrameType | None) -> None:
        if engine.interrupted:
            raise KeyboardInterrupt
        engine.interrupted = number
        say("stopping: what runs saves its state and ends. Once more stops by force; nothing that is finished is lost.")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def about(experiment: Experiment, plan: Plan) -> dict[str, Any]:
    """The part of the record that describes the sweep as a whole."""
    first = experiment.trials[0]
    model = next(iter(plan.models.values()), {})
    tracking = experiment.tracking
    return {
        "common": experiment.common(),
        "store": experiment.store.url,
        "tracking": place_to_keep(tracking.uri, tracking.experiment) if tracking.enabled else None,
        "base": {
            "name": first.model.name or first.model.path,
            "parameters": model.get("n_parameters"),
            "bytes": model.get("n_parameters", 0) * (4 if first.model.dtype == "float32" else 2),
        },
        "data": first.data.name or first.data.path,
        "evaluation": {
            "test_tokens": first.evaluation.windows.sequences * first.evaluation.windows.length,
            "protocol": protocol(first.evaluation.windows.sequences, first.evaluation.windows.length),
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
