"""What a sweep cost, by task, method and trial, and what it did not cost because work was shared or there already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pare.orchestrator.estimate import Estimate, accuracy
from pare.orchestrator.ledger import Ledger

Cost = dict[str, float]

SUMS = ("wall_s", "cpu_s", "gpu_s", "tokens", "disk_bytes")
"""What adds up over tasks; of `peak_bytes` the most counts."""

TOLD = ("cost/tokens", "search/tokens")
"""Under which names results tell tokens that do not follow from the windows that a task reads."""


def spent(task: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> Cost:
    """What one task cost; nothing where it is not done.

    task: `record`, `result` and `cost` as JSON values; tasks: fingerprint -> the like, in which its inputs are looked up.
    wall_s, cpu_s, gpu_s are seconds; tokens those of the windows that it read, or as it tells itself; peak_bytes host memory.
    """
    cost, record, result = task["cost"], task["record"], task["result"]
    windows = tasks.get(record.get("inputs", {}).get("tokens", ""))
    spec = windows["record"]["spec"] if windows else {}
    read = spec.get("sequences", 0) * spec.get("length", 0) if cost else 0
    wall_s = cost.get("wall_s", 0.0)
    return {
        "wall_s": wall_s,
        "cpu_s": cost.get("cpu_s", 0.0),
        "gpu_s": cost.get("slot_s", wall_s) if record.get("device") == "cuda" else 0.0,
        "tokens": next((result[name] for name in TOLD if name in result), read),
        "disk_bytes": cost.get("disk_bytes", 0.0),
        "peak_bytes": cost.get("peak_rss_bytes", 0.0),
    }


def total(costs: Sequence[tuple[Cost, float]]) -> Cost:
    """The sum of costs, each by its share."""
    sums = {name: sum(cost[name] * share for cost, share in costs) for name in SUMS}
    return {**sums, "peak_bytes": max((cost["peak_bytes"] for cost, _ in costs), default=0.0)}


def ingredients(goals: Mapping[str, Any] | None, tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tasks of other trials that a merge is made of: all that its artifact stands on and that are not its own, as far as
    `tasks` knows them."""
    if not goals or not goals.get("members"):
        return []
    own, found, waiting = set(goals["tasks"]), dict[str, None](), [goals["artifact"]]
    while waiting:
        for fingerprint in tasks.get(waiting.pop(), {"record": {}})["record"].get("inputs", {}).values():
            if fingerprint not in found and fingerprint in tasks:
                found[fingerprint] = None
                waiting.append(fingerprint)
    return [fingerprint for fingerprint in found if fingerprint not in own]


def of_trial(goals: Mapping[str, Any] | None, tasks: Mapping[str, Mapping[str, Any]], users: Mapping[str, int]) -> Cost:
    """Of each task its part among the trials that need it; and what the ingredients of a merge cost, all of it."""
    own = [(tasks[fp]["spent"], 1 / users[fp]) for fp in (goals["tasks"] if goals else []) if fp in tasks]
    return total([*own, *((tasks[fp]["spent"], 1.0) for fp in ingredients(goals, tasks))])


def of_sweep(
    ledger: Ledger, run: Mapping[str, Any], trials: Mapping[str, Mapping[str, Any] | None],
    tasks: Mapping[str, Mapping[str, Any]], users: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """The part `cost` of a sweep's record.

    run: row of the latest run; trials: trial -> its goals; tasks: fingerprint -> its row with `spent`; users: fingerprint ->
    number of trials that need it.
    """
    by_method: dict[str, list[tuple[Cost, float]]] = {}
    for task in tasks.values():
        by_method.setdefault(task["record"].get("spec", {}).get("method") or task["type"], []).append((task["spent"], 1.0))
    attempts = attempts_of(ledger, run["sweep"])
    in_run = {row["fingerprint"] for row in attempts if row["run"] == run["id"] and row["status"] == "done"}
    lost = [json.loads(row["cost"] or "{}").get("wall_s", 0.0) for row in attempts if row["status"] == "failed"]
    done = {fp: task["spent"] for fp, task in tasks.items() if task["status"] == "done"}
    return {
        "total": {"tasks": len(done), **total([(cost, 1.0) for cost in done.values()])},
        "failed_attempts": {"attempts": len(lost), "wall_s": sum(lost)},
        "methods": {
            name: {"tasks": len(costs), **total(costs)}
            for name, costs in sorted(by_method.items(), key=lambda item: -sum(cost["wall_s"] for cost, _ in item[1]))
        },
        "trials": {
            name: {
                **of_trial(goals, tasks, users),
                "alone_s": sum(
                    tasks[fp]["spent"]["wall_s"]
                    for fp in [*(goals["tasks"] if goals else []), *ingredients(goals, tasks)]
                    if fp in tasks
                ),
            }
            for name, goals in trials.items()
        },
        "saved": {
            "by_sharing_s": sum(cost["wall_s"] * (users[fp] - 1) for fp, cost in done.items()),
            "by_cache_s": sum(cost["wall_s"] for fp, cost in done.items() if fp not in in_run),
        },
        "estimates": accuracy(*estimated(attempts)),
    }  # fmt: skip


def attempts_of(ledger: Ledger, sweep: str) -> list[Any]:
    return ledger.rows(
        "SELECT attempt.fingerprint, attempt.run, attempt.status, attempt.cost, attempt.estimate FROM attempt "
        "JOIN run ON attempt.run = run.id WHERE run.sweep = ? ORDER BY attempt.id",
        sweep,
    )


def estimated(attempts: Iterable[Any]) -> tuple[dict[str, Estimate], dict[str, Cost]]:
    """Fingerprint -> what the task was expected to cost before it ran, and what it did cost."""
    rows = {row["fingerprint"]: row for row in attempts if row["estimate"] and row["status"] == "done"}
    return (
        {fp: Estimate(**json.loads(row["estimate"])) for fp, row in rows.items()},
        {fp: json.loads(row["cost"]) for fp, row in rows.items()},
    )
