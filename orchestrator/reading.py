"""The verbs that read and write nothing: what came out, what there is, why, and what was printed meanwhile."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pare.orchestrator.commands import (
    NO_WORK,
    SCHEMA_VERSION,
    planned,
    prepare,
    restored,
    show_json,
    states_of,
    wide_console,
)
from pare.orchestrator.errors import ConfigError, PareError, nearest

if TYPE_CHECKING:
    from pare.orchestrator.ledger import Ledger
    from pare.orchestrator.plan import Plan
    from pare.workers.store import Store

FOLLOW_S = 0.3
"""Between two looks at a log that is followed."""


def status(arguments: argparse.Namespace, home: Path) -> int:
    """How far a sweep is, from the ledger alone."""
    from pare.orchestrator import places, upkeep

    ledger = places.ledger_of(home, arguments.store)
    sweep = ledger.find_sweep(arguments.sweep)
    last = ledger.last_run(sweep["id"])
    state = last["status"]
    if state == "running" and last["driver"] == ledger.id and upkeep.driver_of(home) is None:
        state = "interrupted"  # its driver died before it could say so
    trials = ledger.trials(sweep["id"])
    tasks = ledger.rows(
        "SELECT status, label FROM task WHERE fingerprint IN (SELECT DISTINCT json_each.value FROM trial, "
        "json_each(trial.goals, '$.tasks') WHERE trial.sweep = ? AND trial.goals != 'null')",
        sweep["id"],
    )
    counts = Counter(task["status"] for task in tasks)
    running = [task["label"] for task in tasks if task["status"] == "running"]
    if arguments.json:
        show_json(
            {
                "schema_version": SCHEMA_VERSION,
                "sweep": sweep["id"],
                "status": state,
                "tasks": counts,
                "running": running,
                "trials": [{"trial": t["name"], "status": t["status"], "failure": json.loads(t["failure"])} for t in trials],
            }
        )
        return 0
    print(f"sweep {sweep['id']}: {state}; tasks: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    for trial in trials:
        failure = json.loads(trial["failure"])
        print(f"  {trial['status']:8} {trial['name']}" + (f"  {failure['failure']}: {failure['message']}" if failure else ""))
    for label in running:
        print(f"  now: {label}")
    return 0


def report(arguments: argparse.Namespace, home: Path) -> int:
    """Prints a sweep's report; writes nothing."""
    from pare.orchestrator import places
    from pare.orchestrator.record import build_record
    from pare.tracking import plots
    from pare.tracking import report as render

    ledger = places.ledger_of(home, arguments.store)
    sweep = ledger.find_sweep(arguments.sweep)
    record = build_record(ledger, places.store_of(home, sweep, arguments.store), sweep["id"])
    if arguments.json or arguments.format == "json":
        show_json(record)
    elif arguments.format == "md":
        print(render.markdown(record))
    elif arguments.format == "html":
        print(render.html(record, {name: plots.svg(figure) for name, figure in plots.draw(record).items()}))
    else:
        wide_console().print(render.terminal(record))
    return 0


def explain(arguments: argparse.Namespace, home: Path) -> int:
    """Says field by field why tasks are new, or since when they are there."""
    from pare.orchestrator import places
    from pare.orchestrator.estimate import History
    from pare.orchestrator.explain import reasons

    if arguments.overrides:
        experiment, graph, device = prepare(arguments, home)
    else:
        _, experiment, _ = restored(arguments, home, arguments.sweep)
        graph, device = planned(experiment, home)
    ledger, what = places.ledger_if_any(home), arguments.what
    store = places.store_of(home, experiment, arguments.store)
    states, told = states_of(graph, store, ledger)
    for trial in experiment.trials:
        if trial.name == what and trial.skipped:
            raise ConfigError(f"trial {what} has no tasks, it is skipped: {trial.skipped}")
    of_ledger = {} if ledger is None or what in graph.goals else {row["fingerprint"]: row for row in tasks_like(ledger, what)}
    if what in graph.goals:
        asked = graph.goals[what].tasks
    else:
        asked = [only_one(what, {*of_ledger, *(fp for fp in graph.tasks if fp.startswith(what))}, graph.goals)]
    known = History.read(ledger).records
    why = reasons(graph, [fp for fp, state in states.items() if state in ("new", "late")], known, told)
    said = []
    for fp in asked:
        task = graph.tasks.get(fp)
        if task is None:
            row = of_ledger[fp]
            record, others = (
                json.loads(row["record"]),
                {key: t.record for key, t in graph.tasks.items() if t.type == row["type"]},
            )
            about = {"label": row["label"], "type": row["type"], "state": row["status"], "why": "no task of this plan"}
        else:
            record, others = task.record, of_type(ledger, task.type, but=fp) if states[fp] == "new" else {}
            reason = why.get(fp) or NO_WORK[states[fp]]
            about = {"label": task.label, "type": task.type, "state": states[fp], "why": reason}
        said.append({"task": fp[:12], "fingerprint": fp, **about, **compared(record, others, graph, ledger, store)})
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, "name": experiment.name, "device": device, "tasks": said})
        return 0
    for one in said:
        print(f"{one['state']:8}  {one['task']}  {one['label']}: {one['why']}")
        if one["nearest"]:
            print(f"    against {one['nearest'][:12]} ({one['nearest_label']}):")
        for change in one["differences"]:
            modules = f", in {', '.join(change['modules'])}" if change.get("modules") else ""
            print(f"    {change['field']}: {change['was']} -> {change['is']}{modules}")
    return 0


def of_type(ledger: Ledger | None, kind: str, but: str) -> dict[str, Any]:
    """Records of the tasks of a type that the ledger has as done, the latest first."""
    query = (
        "SELECT fingerprint, record FROM task WHERE status = 'done' AND type = ? AND fingerprint != ? ORDER BY finished DESC"
    )
    return {row["fingerprint"]: json.loads(row["record"]) for row in (ledger.rows(query, kind, but) if ledger else ())}


def compared(
    record: dict[str, Any], others: dict[str, Any], graph: Plan, ledger: Ledger | None, store: Store
) -> dict[str, Any]:
    """The nearest of other tasks, and the fields in which a task differs from it; inputs by what they are."""
    from pare.orchestrator import explain as differing

    nearest_one, differences = differing.explain(record, others)
    fingerprints = [v for field, *values in differences if field.startswith("inputs.") for v in values if v]
    labels = {fp: row["label"] for fp, row in (ledger.tasks([*fingerprints, nearest_one or ""]) if ledger else {}).items()}
    labels |= {fp: graph.tasks[fp].label for fp in [*fingerprints, nearest_one] if fp in graph.tasks}

    def shown(value: Any) -> Any:
        return f"{value[:12]} ({labels[value]})" if isinstance(value, str) and value in labels else differing.short(value)

    found = [{"field": field, "was": shown(was), "is": shown(now)} for field, was, now in differences]
    for change, (field, was, now) in zip(found, differences, strict=True):
        if field == "code":
            change["modules"] = differing.changed_modules(store.blobs, was, now)
    return {"nearest": nearest_one, "nearest_label": labels.get(nearest_one or ""), "differences": found}


def tasks_like(ledger: Ledger, prefix: str) -> list[Any]:
    """Rows of the tasks whose fingerprint begins so."""
    return ledger.rows("SELECT * FROM task WHERE substr(fingerprint, 1, ?) = ?", len(prefix), prefix) if prefix else []


def only_one(what: str, found: Collection[str], trials: Iterable[str]) -> str:
    """The one task that is meant."""
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ConfigError(f"{len(found)} tasks begin with {what!r}; type more of one: {', '.join(sorted(found)[:4])}")
    raise ConfigError(f"there is no trial and no task {what!r}.{nearest(what, trials)}")


def logs(arguments: argparse.Namespace, home: Path) -> int:
    """Prints what tasks wrote: one, or those of a trial that failed or run, else all of its own."""
    from pare.orchestrator import places

    ledger = places.ledger_of(home, arguments.store)
    sweep = ledger.find_sweep(arguments.sweep)
    trials = {row["name"]: json.loads(row["goals"]) for row in ledger.trials(sweep["id"])}
    if arguments.what in trials:
        goals = trials[arguments.what] or {"tasks": []}
        rows = ledger.tasks(goals["tasks"])
        own = [rows[fp] for fp in goals["tasks"] if fp in rows]
        tasks = [row for row in own if row["status"] in ("failed", "running")] or own
    else:
        rows = {row["fingerprint"]: row for row in tasks_like(ledger, arguments.what)}
        tasks = [rows[only_one(arguments.what, rows, trials)]]
    store = places.store_of(home, sweep, arguments.store)
    said = [
        {**log_of(ledger, store, home, task["fingerprint"]), "label": task["label"], "status": task["status"]} for task in tasks
    ]
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, "sweep": sweep["id"], "logs": said})
        return 0
    for one in said:
        if len(said) > 1 or not one["text"]:
            print(f"==> {one['label']} ({one['status']}): {one['path']}")
        print(one["text"], end="")
        for attempt in one["attempts"] if not one["text"] else []:
            print(f"    attempt {attempt['number']}: {attempt['status']} {attempt['failure'] or ''} {attempt['message'] or ''}")
        if arguments.follow and one["status"] == "running":
            follow(Path(one["path"]), len(one["text"].encode()), functools.partial(is_running, ledger, one["fingerprint"]))
    return 0


def is_running(ledger: Ledger, fingerprint: str) -> bool:
    return bool(ledger.tasks([fingerprint])[fingerprint]["status"] == "running")


def log_of(ledger: Ledger, store: Store, home: Path, fingerprint: str) -> dict[str, Any]:
    """A task's log as it stands, here or in the store, and its attempts."""
    from pare.workers.blobs import log_key

    path = home / log_key(fingerprint)
    if path.exists():
        text = path.read_bytes()
    else:
        try:
            text = store.blobs.read(log_key(fingerprint))
        except FileNotFoundError:
            text = b""
    attempts = ledger.rows("SELECT * FROM attempt WHERE fingerprint = ? ORDER BY id", fingerprint)
    return {
        "task": fingerprint[:12],
        "fingerprint": fingerprint,
        "path": str(path),
        "text": text.decode(errors="replace"),
        "attempts": [{key: row[key] for key in ("number", "status", "failure", "message")} for row in attempts],
    }


def follow(log: Path, position: int, goes_on: Callable[[], bool]) -> None:
    """Prints what is added to a log until its task has ended."""
    last = False
    while True:
        if log.exists():
            with log.open("rb") as f:
                f.seek(position)
                added = f.read()
            position += len(added)
            print(added.decode(errors="replace"), end="", flush=True)
        if last:
            return
        last = not goes_on()  # what it wrote at its very end is still to come
        time.sleep(0 if last else FOLLOW_S)


def methods(arguments: argparse.Namespace, home: Path) -> int:
    """Lists the methods."""
    from pare.methods.contract import family, field_docs, load_all
    from pare.orchestrator.plan import default_of

    found: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": cls.kind,
            "family": family(cls),
            "needs": [*(s.name for s in cls.needs), *(s.name for s in cls.needs_gradients)],
            "summary": (sys.modules[cls.__module__].__doc__ or "").strip().split("\n")[0],
            "source": cls.source,
            "extra": cls.extra,
            "settings": [
                {"name": f.name, "type": str(f.type), "default": default_of(f), "doc": field_docs(cls).get(f.name, "")}
                for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            ],
        }
        for name, cls in sorted(load_all().items())
    ]
    if arguments.json:
        show_json(found)
        return 0
    from rich.table import Table

    table = Table(title="methods", show_lines=True)
    for column in ("method", "kind", "family", "what", "settings"):
        table.add_column(column)
    for entry in found:
        settings = ", ".join(f"{s['name']}={s['default']}" for s in entry["settings"])
        table.add_row(
            entry["name"], entry["kind"], entry["family"], f"{entry['summary']}\n[dim]{entry['source']}[/dim]", settings
        )
    wide_console().print(table)
    return 0


def export(arguments: argparse.Namespace, home: Path) -> int:
    """Copies a trial's exported model to a directory."""
    from pare.orchestrator import places
    from pare.orchestrator.record import build_record
    from pare.workers.export import adapter
    from pare.workers.export.card import with_metrics
    from pare.workers.store import MANIFEST, ArtifactError

    ledger = places.ledger_of(home, arguments.store)
    sweep = ledger.find_sweep(arguments.sweep)
    trials = {trial["name"]: trial for trial in ledger.trials(sweep["id"])}
    if arguments.trial not in trials:
        raise ConfigError(f"sweep {sweep['id']} has no trial {arguments.trial!r}.{nearest(arguments.trial, trials)}")
    goals = json.loads(trials[arguments.trial]["goals"])
    store = places.store_of(home, sweep, arguments.store)
    target = Path(arguments.to or arguments.trial)
    if target.exists():
        raise ConfigError(f"--to {target}: exists already; name a directory that does not")
    try:
        source = store.open(goals["export"]) if goals else None
    except ArtifactError as e:
        again = f"pare rerun {arguments.trial}" if store.has(e.fingerprint) else sweep["command"]
        raise ConfigError(f"{e}. Make it again: {again}") from e
    if source is None:
        raise ConfigError(f"trial {arguments.trial} was skipped; it has no export")
    partial = target.with_name(target.name + ".partial")
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(MANIFEST))
    partial.rename(target)
    if (target / "adapter_config.json").exists():
        adapter.relocate(target)
    record = build_record(ledger, store, sweep["id"])
    metrics = next(t["metrics"] for t in record["trials"] if t["trial"] == arguments.trial)
    (target / "README.md").write_text(with_metrics((target / "README.md").read_text(), metrics))
    about = json.loads((target / "export.json").read_text())
    print(f"{target}: {about['format']}, opens with {about['opens_with']}")
    return 0


def ui(arguments: argparse.Namespace, home: Path) -> int:
    """Serves the MLflow UI."""
    from pare.orchestrator.outbox import tracking_place
    from pare.tracking import ui as server

    uri, artifacts, _ = tracking_place(home)
    if uri == "auto" and not (home / "mlflow.db").exists():
        raise ConfigError(f"nothing is tracked in {home} yet. Try: pare run experiment=demo")
    try:
        server.serve(uri, artifacts, port=arguments.port)
    except server.UiError as e:
        raise PareError(str(e)) from e
    return 0


def doctor(arguments: argparse.Namespace, home: Path) -> int:
    """Checks the installation, or what Pare makes of a model."""
    from pare.orchestrator import doctor as clinic

    about: dict[str, Any] = {}
    if arguments.model:
        from pare.orchestrator.model_doctor import examine, lines

        about, findings = examine(arguments.model, arguments.plugin)
        if not arguments.json and about:
            print("\n".join(lines(about)))
    else:
        findings = clinic.examine(home)
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, **({"anatomy": about} if arguments.model else {}), "findings": findings})
    else:
        for finding in findings:
            print(f"{ {'ok': '✓', 'warn': '!', 'fail': '✗'}[finding['state']] } {finding['what']}: {finding['found']}")
            if finding["remedy"]:
                print(f"    {finding['remedy']}")
    return 0 if all(f["state"] != "fail" for f in findings) else 4
