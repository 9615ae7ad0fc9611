"""The record of a sweep: one plain JSON object, made from the ledger, from which every report and MLflow are drawn."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pare.orchestrator import costs
from pare.orchestrator.fingerprint import digest
from pare.orchestrator.ledger import Ledger, now
from pare.tracking.pareto import mark_front
from pare.workers.store import Store

SCHEMA_VERSION = 1


def build_record(ledger: Ledger, store: Store, sweep_id: str) -> dict[str, Any]:
    """The record of a sweep as it stands now."""
    record = record_head(ledger, sweep_id)
    rows = ledger.trials(record["sweep"])
    goals = {row["name"]: json.loads(row["goals"]) for row in rows}
    users = task_users(goals.values())
    tasks = tasks_of(ledger, sorted(users))
    record["saving"] = saving(tasks, users)
    record["cost"] = costs.of_sweep(ledger, dict(ledger.last_run(record["sweep"])), goals, tasks, users)
    record["trials"] = [trial_record(row, goals[row["name"]], tasks, users, store) for row in rows]
    mark_front(record)
    return record


def record_head(ledger: Ledger, sweep_id: str) -> dict[str, Any]:
    """The record of a sweep without its trials and what they share."""
    sweep = ledger.find_sweep(sweep_id)
    run = ledger.last_run(sweep["id"])
    finished = run["finished"]
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep": sweep["id"],
        "name": sweep["name"],
        "about": {
            "command": sweep["command"],
            "started_at": iso(run["started"]),
            "finished_at": iso(finished) if finished else None,
            "wall_s": (finished or now()) - run["started"],
            "status": run["status"],
            **json.loads(sweep["about"]),
        },
        "tasks": {
            "total_if_separate": run["total_if_separate"],
            "unique": run["unique_tasks"],
            "executed": run["executed"],
            "cached": run["cached"],
        },
        "saving": saving({}, {}),
        "trials": [],
    }


def one_trial(ledger: Ledger, store: Store, sweep_id: str, name: str, users: dict[str, int]) -> dict[str, Any]:
    """One entry of `trials` without reading the others.

    users: what `task_users` counts over the whole sweep; counted, or counted anew, where it lacks a task of the trial.
    """
    (row,) = ledger.rows("SELECT * FROM trial WHERE sweep = ? AND name = ?", sweep_id, name)
    goals = json.loads(row["goals"])
    if goals and not users.keys() >= set(goals["tasks"]):
        users.update(task_users(json.loads(other["goals"]) for other in ledger.trials(sweep_id)))
    return trial_record(row, goals, tasks_of(ledger, behind(ledger, goals)) if goals else {}, users, store)


def behind(ledger: Ledger, goals: dict[str, Any]) -> list[str]:
    """The tasks of a trial, and of a merge those that its members were made by."""
    found, new = dict.fromkeys(goals["tasks"]), goals["tasks"] if goals.get("members") else []
    while new:
        records = [json.loads(row["record"]) for row in ledger.tasks(list(new)).values()]
        new = [fp for record in records for fp in record.get("inputs", {}).values() if fp not in found]
        found |= dict.fromkeys(new)
    return list(found)


def tasks_of(ledger: Ledger, fingerprints: list[str]) -> dict[str, dict[str, Any]]:
    """Fingerprint -> the ledger's row, with `record`, `result` and `cost` as values, and `spent`."""
    found = {}
    for fingerprint, row in ledger.tasks(fingerprints).items():
        done = row["status"] == "done"
        found[fingerprint] = {
            **{name: row[name] for name in ("fingerprint", "type", "label", "status")},
            "record": outline(json.loads(row["record"])),
            "result": json.loads(row["result"] or "{}") if done else {},
            "cost": json.loads(row["cost"] or "{}"),
        }
    for task in found.values():
        task["spent"] = costs.spent(task, found)
    return found


def outline(record: dict[str, Any]) -> dict[str, Any]:
    """What of a task's record tells its cost. The whole records of ten thousand trials would fill memory."""
    spec = record.get("spec", {})
    return {
        "inputs": record.get("inputs", {}),
        "device": record.get("device"),
        "spec": {key: spec[key] for key in ("method", "sequences", "length") if key in spec},
    }


def trial_uid(sweep_id: str, name: str) -> str:
    """Names a trial's run in MLflow: the same for the same request, wherever it runs."""
    return digest([sweep_id, name])[:16]


def task_users(goals: Iterable[dict[str, Any] | None]) -> dict[str, int]:
    """Fingerprint -> number of trials whose result needs the task."""
    return dict(Counter(fp for g in goals if g for fp in g["tasks"]))


def trial_record(
    row: Any, goals: dict[str, Any] | None, tasks: dict[str, Any], users: dict[str, int], store: Store
) -> dict[str, Any]:
    """One entry of `trials`."""
    own = [tasks[fp] for fp in goals["tasks"] if fp in tasks] if goals else []
    results = {task["fingerprint"]: task["result"] for task in own if task["status"] == "done"}
    metrics: dict[str, float] = {}
    notes: list[str] = []
    curves: dict[str, list[list[float]]] = {}
    for task in own:
        # The base's score is the teacher of all trials; only a trial's own stages, export and measurements speak for it.
        if (
            goals is None
            or task["fingerprint"] not in results
            or (task["type"] == "score" and task["fingerprint"] != goals["score"])
        ):
            continue
        result = results[task["fingerprint"]]
        if task["type"] not in ("score", "import_model", "corpus", "tokens", "questions", "pairs", "benchmark"):
            said = result.get("notes", [])  # numbers by name from a method, sentences from a measurement
            metrics.update({k: v for k, v in {**result, **(said if isinstance(said, dict) else {})}.items() if is_metric(k, v)})
            notes += [note for note in said if isinstance(said, list) and note not in notes]
        if task["type"] == "train":
            curves.update(read_curves(store.read_file(task["fingerprint"], "curve.jsonl")))
    if own:
        share = costs.of_trial(goals, tasks, users)
        told = ("wall_s", "cpu_s", "tokens", *(["gpu_s"] if share["gpu_s"] else []))
        metrics.update({f"cost/{name}": share[name] for name in told})
    export = results.get(goals["export"], {}) if goals else {}
    evaluation = store.read_file(goals["evaluate"], "evaluation.json") if goals and row["status"] == "done" else None
    return {
        "trial": row["name"],
        "uid": trial_uid(row["sweep"], row["name"]),
        "block": row["block"],
        "recipe": row["recipe"],
        "overrides": json.loads(row["overrides"]),
        "status": row["status"],
        "metrics": metrics,
        "artifact": goals["artifact"] if goals and row["status"] == "done" else None,
        "export_path": str(store.path(goals["export"]).absolute()) if goals and export else None,
        "opens_with": export.get("opens_with"),
        "pareto": False,
        "error": json.loads(row["failure"]) if row["failure"] else None,
        "notes": notes,
        "curves": curves,
        "windows": read_kept(evaluation, "windows"),
        "answers": read_kept(evaluation, "answers"),
        "members": goals.get("members", []) if goals else [],
        "directions": results.get(goals["evaluate"], {}).get("directions", {}) if goals else {},
        "config": json.loads(row["config"]),
        "tasks": [
            {
                "task": task["fingerprint"][:12],
                "type": task["type"],
                "label": task["label"],
                "status": task["status"],
                "wall_s": task["cost"].get("wall_s"),
                "shared_by": users[task["fingerprint"]],
            }
            for task in own
        ],
    }


def is_metric(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, int | float) and not isinstance(value, bool)


def saving(tasks: dict[str, Any], users: dict[str, int]) -> dict[str, Any]:
    """What it saved that equal tasks of several trials ran once."""
    shared = [
        {"label": task["label"], "used_by": users[fp], "wall_s": task["spent"]["wall_s"]}
        for fp, task in tasks.items()
        if users[fp] > 1 and task["cost"]
    ]
    return {
        "tasks_not_repeated": sum(n - 1 for n in users.values()),
        "wall_s_saved": sum(s["wall_s"] * (s["used_by"] - 1) for s in shared),
        "shared": sorted(shared, key=lambda s: -s["wall_s"] * (s["used_by"] - 1)),
    }


def read_curves(data: bytes | None) -> dict[str, list[list[float]]]:
    """Step curves that a training task wrote: name -> [[step, value], ...]."""
    curves: dict[str, list[list[float]]] = {}
    for line in (data or b"").splitlines():
        point = json.loads(line)
        for name in point.keys() - {"step"}:
            curves.setdefault(f"train/{name}", []).append([point["step"], point[name]])
    return curves


def read_kept(data: bytes | None, what: str) -> dict[str, Any]:
    """What an evaluation keeps for comparisons of trials: `windows`, sums over each test window, or `answers`."""
    return dict(json.loads(data).get(what, {})) if data else {}


def outcome_digest(record: dict[str, Any]) -> str:
    """Changes when a trial's outcome does; not when a sweep is merely run again."""
    return digest([[t["uid"], t["status"], t["metrics"], t["pareto"], t["error"]] for t in record["trials"]])


def iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
