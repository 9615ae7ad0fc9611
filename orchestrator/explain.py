"""Why a task is new: what differs between its record and the nearest one that is known, field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pare.orchestrator.fingerprint import CODE, canonical
from pare.workers.blobs import Blobs

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


def explain(record: Mapping[str, Any], known_records: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, list[Difference]]:
    """The nearest known task of a task's type (None where there is none), and all that differs between the two.

    known_records: fingerprint -> record. Of several at the same distance the first counts.
    """
    alike = {fp: frozenset(leaves(other)) for fp, other in known_records.items() if other.get("type") == record.get("type")}
    return nearest(frozenset(leaves(record)), alike)


def nearest(own: Leaves, known: Mapping[str, Leaves]) -> tuple[str | None, list[Difference]]:
    if not known:
        return None, []
    fingerprint = min(known, key=lambda fp: len(known[fp] ^ own))
    was, now = dict(known[fingerprint] - own), dict(own - known[fingerprint])
    paths = sorted(was.keys() | now.keys())
    return fingerprint, [(path, json.loads(was.get(path, "null")), json.loads(now.get(path, "null"))) for path in paths]


def reasons(
    plan: Plan, new: Iterable[str], known_records: Mapping[str, Mapping[str, Any]], told: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Fingerprint -> why the task has to run, in a few words, for the tasks `new` of a plan.

    known_records: fingerprint -> record of the tasks that have run before, the latest first; told: reasons that do not lie
    in records.
    """
    run = set(new)
    known: dict[str, dict[str, Leaves]] = {}
    for fingerprint, record in known_records.items():
        if len(alike := known.setdefault(record["type"], {})) < COMPARED:
            alike[fingerprint] = frozenset(leaves(record))
    found = {}
    for fingerprint in run:
        task = plan.tasks[fingerprint]
        made_anew = next((role for role, fp in task.inputs.items() if fp in run), None)
        if task.late:
            found[fingerprint] = "late: known when all that it may take has been scored"
        elif told and fingerprint in told:
            found[fingerprint] = told[fingerprint]
        elif fingerprint in known_records:
            found[fingerprint] = "has run before, and its result is no longer in the store"
        elif made_anew:
            found[fingerprint] = f"its {made_anew} is new: {plan.tasks[task.inputs[made_anew]].label}"
        else:
            found[fingerprint] = sentence(nearest(frozenset(leaves(task.record)), known.get(task.type, {}))[1])
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


def remember_code(blobs: Blobs) -> None:
    """Keeps, beside the artifacts that it makes, what the code digests of this process cover (`code/<digest>.json`)."""
    there = set(blobs.list("code"))
    for code, trees in CODE.items():
        if code_key(code) not in there:
            blobs.create(code_key(code), canonical(trees).encode())


def changed_modules(blobs: Blobs, was: str, now: str) -> list[str] | None:
    """The modules that differ between two code digests; None where it is not known what one of them covers."""
    known = []
    for code in (was, now):
        try:
            known.append(CODE[code] if code in CODE else json.loads(blobs.read(code_key(code))))
        except FileNotFoundError:
            return None
    before, after = known
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def code_key(code: str) -> str:
    return f"code/{code}.json"
