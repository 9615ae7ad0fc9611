"""Why a task is new: what differs between its record and the nearest one that is known, field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pare.orchestrator.fingerprint import canonical

if TYPE_CHECKING:
    from pare.orchestrator.plan import Plan

COMPARED = 64
"""Known tasks of a type that each new one of a whole plan is compared with, the latest first."""

SHOWN = 3
"""Fields that a reason names."""

Leaves = frozenset[tuple[str, str]]
"""(path, value) of everything in a JSON value that is no container."""

Difference = tuple[str, Any, Any]
"""(field, what it was, what it is); None where a side lacks the field."""


def leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    """(dotted path, value as JSON) of everything in a JSON value that is no container, or an empty one."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and value:
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, f"{path}.{i}")]
    return [(path, canonical(value))]


def explain(record: Mapping[str, Any], known_records: Iterable[Mapping[str, Any]]) -> list[Difference]:
    """All that differs between a task and the nearest known one of its type.

    Empty where no task of the type is known. Of several at the same distance the first counts.
    """
    alike = [frozenset(leaves(other)) for other in known_records if other.get("type") == record.get("type")]
    return nearest(frozenset(leaves(record)), alike)


def nearest(own: Leaves, known: Sequence[Leaves]) -> list[Difference]:
    if not known:
        return []
    other = min(known, key=lambda other: len(other ^ own))
    was, now = dict(other - own), dict(own - other)
    return [
        (path, json.loads(was.get(path, "null")), json.loads(now.get(path, "null"))) for path in sorted(was.keys() | now.keys())
    ]


def reasons(plan: Plan, new: Iterable[str], known_records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprint -> why the task has to run, in a few words, for the tasks `new` of a plan.

    known_records: fingerprint -> record of the tasks that have run before, the latest first.
    """
    run = set(new)
    known: dict[str, list[Leaves]] = {}
    for record in known_records.values():
        if len(alike := known.setdefault(record["type"], [])) < COMPARED:
            alike.append(frozenset(leaves(record)))
    found = {}
    for fingerprint in run:
        task = plan.tasks[fingerprint]
        made_anew = next((role for role, fp in task.inputs.items() if fp in run), None)
        if task.late:
            found[fingerprint] = "late: known when all that it may take has been scored"
        elif fingerprint in known_records:
            found[fingerprint] = "has run before, and its result is no longer in the store"
        elif made_anew:
            found[fingerprint] = f"its {made_anew} is new: {plan.tasks[task.inputs[made_anew]].label}"
        else:
            found[fingerprint] = sentence(nearest(frozenset(leaves(task.record)), known.get(task.type, [])))
    return found


def sentence(differences: Sequence[Difference]) -> str:
    """The differences in one line."""
    if not differences:
        return "nothing like it has run"
    parts = [
        "the code has changed" if path == "code" else f"{path} {short(was)} -> {short(now)}" for path, was, now in differences
    ]
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more


def short(value: Any) -> str:
    """A value as one types it; a digest by its beginning."""
    text = value if isinstance(value, str) else canonical(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text
