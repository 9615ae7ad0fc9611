"""Keeping a store in order: `fsck` finds what is wrong with it, `gc` says what may go and lets it go.

Both return plain data. Several sweeps, ledgers and users share a store, so `gc` asks all of them: what any of them knows
is never removed; at most its files are dropped, and its manifest stays and counts as done. `known` makes one picture of
the rows of any number of ledgers.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pare.workers.blobs import Blobs, local_path
from pare.workers.store import ArtifactError, Store

KEEP = ("all", "pareto", "exports")
GRACE_S = 7 * 24 * 3600.0
"""Age below which what nobody knows may still be somebody's work in progress."""

SELF_CONTAINED = frozenset(
    {
        "import_model",
        "adopt",
        "corpus",
        "tokens",
        "questions",
        "pairs",
        "benchmark",
        "calibrate",
        "gradients",
        "levels",
        "allocate",
        "score",
        "export",
        "evaluate",
        "speed",
    }
)
"""Task types whose artifacts are read without what they were made from. A compressed model is not: it stands on its base."""
ASIDE = frozenset({"tokens", "statistics", "gradients", "teacher", "levels", "allocation"})
"""Roles of inputs that went into an artifact without being referred to by it, each of one or (`teacher.NAME`) of several."""


@dataclass(frozen=True)
class KnownTask:
    type: str
    label: str
    done: bool
    wall_s: float
    inputs: dict[str, str]

    @property
    def stands_on(self) -> list[str]:
        """Artifacts without which this one cannot be read."""
        if self.type in SELF_CONTAINED:
            return []
        return [fp for role, fp in self.inputs.items() if role.partition(".")[0] not in ASIDE]


@dataclass(frozen=True)
class KnownTrial:
    sweep: str
    name: str
    final: bool
    goals: dict[str, Any]
    """Empty where the trial has none (yet)."""


@dataclass
class Known:
    """What ledgers say."""

    tasks: dict[str, KnownTask] = field(default_factory=dict)
    trials: list[KnownTrial] = field(default_factory=list)


def known(tasks: Iterable[Any], trials: Iterable[Any]) -> Known:
    """From rows of the tables `task` and `trial`, of one ledger or of several one after the other.

    A task is done when one of them says so.
    """
    found = Known()
    for row in tasks:
        before = found.tasks.get(row["fingerprint"])
        done = row["status"] == "done" or (before is not None and before.done)
        wall_s = float(json.loads(row["cost"] or "{}").get("wall_s") or 0.0)
        inputs = json.loads(row["record"] or "{}").get("inputs", {})
        found.tasks[row["fingerprint"]] = KnownTask(row["type"], row["label"], done, wall_s, inputs)
    for row in trials:
        final = row["status"] not in ("pending", "running")
        found.trials.append(KnownTrial(row["sweep"], row["name"], final, json.loads(row["goals"] or "null") or {}))
    return found


# -- fsck --------------------------------------------------------------------------------------------------------------


def fsck(store: Store, ledgers: Known, repair: bool = False, grace_s: float = GRACE_S) -> list[dict[str, Any]]:
    """Reads every byte of a store and says what is wrong: [{"kind", "name", "message", "repaired"}, ...].

    kind:
    - `damaged`: an artifact differs from its manifest, or has none that can be read; repair: quarantined, so that the next
      run makes it anew;
    - `unfinished`: an artifact was dropped and some of its files are still there; repair: they go;
    - `lost`: a ledger has a task as done whose artifact is not there; the next run that needs it makes it anew;
    - `leftover`: what an attempt that died left behind, or older than `grace_s`; repair: it goes;
    - `nondeterministic`: two attempts at a task came to different results (a fact, nothing to repair).
    """
    findings: list[dict[str, Any]] = []

    def find(kind: str, name: str, message: str, repaired: bool = False) -> None:
        findings.append({"kind": kind, "name": name, "message": message, "repaired": repaired})

    there = set(store.artifacts())
    for fingerprint in sorted(there):
        try:
            problems = store.problems(fingerprint)
        except ArtifactError as e:  # of another format: not ours to judge
            find("damaged", fingerprint, str(e))
            continue
        if not problems:
            continue
        label = ledgers.tasks[fingerprint].label if fingerprint in ledgers.tasks else "known to no ledger"
        unfinished = all("still there" in problem for problem in problems)
        if repair and unfinished:
            store.drop_files(fingerprint)
        elif repair:
            store.quarantine(fingerprint)
        find("unfinished" if unfinished else "damaged", fingerprint, f"{label}: {'; '.join(problems)}", repair)
    for fingerprint, task in ledgers.tasks.items():
        if task.done and fingerprint not in there:
            find("lost", fingerprint, f"{task.label}: done according to the ledger, and not in the store")
    for leftover in store.leftovers():
        if leftover.kind == "dead" or (leftover.kind == "unknown" and leftover.age_s > grace_s):
            if repair:
                store.discard(leftover)
            find("leftover", leftover.name, f"{leftover.bytes} bytes of an attempt that was not finished", repair)
    for key in store.blobs.list("nondeterminism"):
        note = json.loads(store.blobs.read(key))
        what = ", ".join(note["files"]) or "its result"
        find("nondeterministic", note["fingerprint"], f"{note['type']}: another attempt came to different content of {what}")
    return findings


# -- gc ----------------------------------------------------------------------------------------------------------------


def gc(
    store: Store,
    ledgers: Known,
    keep: str = "all",
    limit_bytes: float | None = None,
    dry_run: bool = True,
    front: Collection[tuple[str, str]] = (),
    spared: Collection[str] = (),
    grace_s: float = GRACE_S,
) -> dict[str, Any]:
    """What may go, or went: {"before_bytes", "after_bytes", "over_limit_bytes", "dry_run", "items": [...]}.

    Files of an intermediate are dropped once everything that reads it is done, with keep="exports" or "pareto", or as far as
    the limit asks for it: first what gives most bytes per second of making it anew. Exports stay; with "pareto" those of
    `front`, [(sweep, trial), ...], and of trials that are not over. Removed altogether is only what no ledger knows, when it
    is older than `grace_s` and no lease is on it. So are checkpoints of tasks that no ledger knows or that are done.
    `spared` are fingerprints of which nothing goes.

    items: {"action": "drop" | "remove" | "discard", "name", "type", "label", "bytes", "why"}, in the order of their going.
    """
    if keep not in KEEP:
        raise ValueError(f"store.keep must be one of {', '.join(KEEP)}, got {keep!r}")
    manifests = {}
    for fingerprint in store.artifacts():
        try:
            manifests[fingerprint] = store.manifest(fingerprint)
        except ArtifactError:
            continue  # damaged: `fsck` tells of it
    files = {fp: store.stored(manifest) for fp, manifest in manifests.items()}
    users = Counter(file.key for own in files.values() for file in own)
    leftovers = store.leftovers()
    sizes = {file.key: file.bytes for own in files.values() for file in own}
    checkpoints = of_checkpoints(store.blobs)
    total = before = sum(sizes.values()) + sum(x.bytes for x in leftovers) + sum(n for _, n, _ in checkpoints.values())
    leased = {PurePosixPath(key).name for key in store.blobs.list("leases")}
    held = in_use(ledgers, leased) | set(spared)
    items: list[dict[str, Any]] = []

    def go(action: str, name: str, kind: str, label: str, freed: int, why: str) -> None:
        nonlocal total
        total -= freed
        items.append({"action": action, "name": name, "type": kind, "label": label, "bytes": freed, "why": why})

    def take(action: str, fingerprint: str, label: str, why: str) -> None:
        """An artifact's files; those that another artifact shares by a hard link free nothing."""
        going = {file.key for file in files.pop(fingerprint) if action == "remove" or not file.light}
        users.subtract(going)
        go(action, fingerprint, manifests[fingerprint]["type"], label, sum(sizes[key] for key in going if not users[key]), why)
        if not dry_run:
            store.drop_files(fingerprint) if action == "drop" else store.remove(fingerprint)

    for leftover in leftovers:
        if leftover.kind == "dead" or leftover.age_s > grace_s:
            go("discard", leftover.name, leftover.kind, "", leftover.bytes, "left behind")
            if not dry_run:
                store.discard(leftover)
    for fingerprint, (keys, size, age_s) in checkpoints.items():
        is_over = fingerprint in manifests or fingerprint not in ledgers.tasks
        if is_over and fingerprint not in held and age_s > grace_s:
            go("discard", f"checkpoints/{fingerprint}", "checkpoint", "", size, "its task is done, or no ledger knows it")
            for key in [] if dry_run else keys:
                store.blobs.delete(key)
    for fingerprint, manifest in manifests.items():
        unknown = fingerprint not in ledgers.tasks and fingerprint not in held
        if unknown and time.time() - manifest["published"] > grace_s:
            take("remove", fingerprint, manifest["type"], "no ledger knows it")
    heavy = {fp: sum(file.bytes for file in own if not file.light) for fp, own in files.items()}
    results = {t.goals.get(role) for t in ledgers.trials for role in ("evaluate", "speed")}
    exports = {t.goals["export"]: t for t in ledgers.trials if t.goals.get("export")}
    kept_exports = {
        t.goals["export"] for t in ledgers.trials if t.goals.get("export") and (not t.final or (t.sweep, t.name) in front)
    }
    waiting = sorted(
        (fp for fp in files if fp in ledgers.tasks and fp not in held | results and heavy[fp]),
        key=lambda fp: (-heavy[fp] / (1.0 + ledgers.tasks[fp].wall_s), fp),
    )
    progress = True
    while progress:  # again when something went on which something else stands
        progress = False
        standing = {base for fp in files if fp in ledgers.tasks and not manifests[fp].get("dropped")
                    for base in ledgers.tasks[fp].stands_on}  # fmt: skip
        for fingerprint in [fp for fp in waiting if fp in files and fp not in standing]:
            task = ledgers.tasks[fingerprint]
            if fingerprint in exports:
                if keep != "pareto" or fingerprint in kept_exports:
                    continue
                why = "not on the front"
            elif keep != "all":
                why = "all that reads it is done"
            elif limit_bytes is not None and total > limit_bytes:
                why = "the disk limit, and all that reads it is done"
            else:
                continue
            take("drop", fingerprint, task.label, why)
            progress = True
    if not dry_run:
        remove_empty_folders(store)
    over = max(0, int(total - limit_bytes)) if limit_bytes is not None else 0
    return {"before_bytes": before, "after_bytes": total, "over_limit_bytes": over, "dry_run": dry_run, "items": items}


def in_use(ledgers: Known, leased: Collection[str] = ()) -> set[str]:
    """Artifacts whose files something may still read: inputs of tasks that are wanted and not done, and what those stand on."""
    wanted = {fp for trial in ledgers.trials for fp in trial.goals.get("tasks", [])}
    readers = [task for fp, task in ledgers.tasks.items() if (fp in wanted and not task.done) or fp in leased]
    waiting = [fp for task in readers for fp in task.inputs.values()]
    # A trial that merges others names its inputs only when they are over: any of its sweep may be among them.
    late = {t.sweep for t in ledgers.trials if not t.final and not ledgers.tasks.keys() >= set(t.goals.get("tasks", [None]))}
    waiting += [t.goals["artifact"] for t in ledgers.trials if t.sweep in late and t.goals.get("artifact")]
    held: set[str] = set(leased)
    while waiting:
        fingerprint = waiting.pop()
        if fingerprint not in held:
            held.add(fingerprint)
            waiting += ledgers.tasks[fingerprint].stands_on if fingerprint in ledgers.tasks else []
    return held


def of_checkpoints(blobs: Blobs) -> dict[str, tuple[list[str], int, float]]:
    """Fingerprint -> keys of the task's checkpoint, their bytes, and seconds since the last of them was written."""
    found: dict[str, tuple[list[str], int, float]] = {}
    for key, size, age_s in blobs.details("checkpoints"):
        keys, total, age = found.get(key.split("/")[1], ([], 0, age_s))
        found[key.split("/")[1]] = ([*keys, key], total + size, min(age, age_s))
    return found


def remove_empty_folders(store: Store) -> None:
    """Folders of a local store in which nothing is left. Whoever writes into one makes it anew."""
    root = local_path(store.location)
    if root is not None:
        for name in ("objects", "checkpoints", "ledger", "nondeterminism", "quarantine"):
            for folder, _, _ in os.walk(root / name, topdown=False):
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(folder)
