"""The verbs that keep a home and its store in order, and what a sweep leaves to them when it ends."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pare.orchestrator.commands import SCHEMA_VERSION, say, show_json
from pare.orchestrator.errors import ConfigError, PareError
from pare.tracking.units import size

if TYPE_CHECKING:
    from pare.orchestrator.config import Experiment
    from pare.orchestrator.housekeeping import Known
    from pare.orchestrator.ledger import Ledger
    from pare.workers.store import Store

POLL_S = 0.2
PATIENCE_S = 60.0
"""How long a driver that was stopped by force may take to end."""
DAMAGE = frozenset({"damaged", "unfinished", "lost", "ledger"})
"""Findings of `fsck` that are damage as long as they are not repaired."""


def gc(arguments: argparse.Namespace, home: Path) -> int:
    """Frees disk: what nobody needs any more, and what may be made anew."""
    from pare.orchestrator import housekeeping, places

    ledger = places.ledger_of(home, arguments.store)
    store = places.store_of(home, ledger.find_sweep(None), arguments.store)
    known = ledgers(ledger, store)
    limit = arguments.limit_gb * 1e9 if arguments.limit_gb is not None else None
    front = front_of(ledger, store, known) if arguments.keep == "pareto" else ()
    done = housekeeping.gc(store, known, arguments.keep, limit, arguments.dry_run, front)
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, "store": store.location, **done})
        return 0
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in done["items"]:
        groups.setdefault((item["type"], item["why"]), []).append(item)
    for (what, why), items in groups.items():
        print(f"{size(sum(item['bytes'] for item in items)):>10}  {len(items)} x {what}: {why}")
    print(f"{store.location}: {in_words(done)}")
    return 0


def in_words(done: dict[str, Any]) -> str:
    freed, left = size(done["before_bytes"] - done["after_bytes"]), size(done["after_bytes"])
    over = f"; {size(done['over_limit_bytes'])} above the limit, all of it needed" if done["over_limit_bytes"] else ""
    return f"{freed} {'would be freed' if done['dry_run'] else 'freed'}, {left} kept{over}"


def fsck(arguments: argparse.Namespace, home: Path) -> int:
    """Reads every byte of the store and says what is wrong with it."""
    from pare.orchestrator import housekeeping, places

    ledger = places.ledger_of(home, arguments.store)
    store = places.store_of(home, ledger.find_sweep(None), arguments.store)
    findings = [
        {"kind": "ledger", "name": str(ledger.path), "message": row[0], "repaired": False}
        for row in ledger.rows("PRAGMA integrity_check")
        if row[0] != "ok"
    ]
    findings += housekeeping.fsck(store, ledgers(ledger, store), arguments.repair)
    damage = [f for f in findings if f["kind"] in DAMAGE and not f["repaired"]]
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, "store": store.location, "damaged": bool(damage), "findings": findings})
        return 8 if damage else 0
    for finding in findings:
        print(
            f"{finding['kind']:16} {finding['name'][:24]}  {finding['message']}{' (repaired)' if finding['repaired'] else ''}"
        )
    count = Counter(finding["kind"] for finding in findings)
    print(f"{store.location}: " + (", ".join(f"{n} {kind}" for kind, n in count.items()) or "all is well"))
    if any(f["kind"] in ("damaged", "unfinished") for f in damage):
        say("pare fsck --repair sets aside what is damaged; the next run that needs it makes it anew")
    return 8 if damage else 0


def ledgers(ledger: Ledger, store: Store) -> Known:
    """What this home's ledger says, and those of all others that work on the store."""
    from pare.orchestrator import housekeeping, segments

    others = segments.rows(store.blobs)
    tasks = itertools.chain(ledger.rows("SELECT * FROM task"), others["task"])
    return housekeeping.known(tasks, itertools.chain(ledger.rows("SELECT * FROM trial"), others["trial"]))


def front_of(ledger: Ledger, store: Store, known: Known) -> set[tuple[str, str]]:
    """(sweep, trial) of all trials on the front of a sweep of this ledger. What others keep is theirs to judge: all of it."""
    from pare.orchestrator.record import build_record

    own = {sweep["id"] for sweep in ledger.sweeps()}
    front = {(trial.sweep, trial.name) for trial in known.trials if trial.sweep not in own}
    return front | {(id, t["trial"]) for id in own for t in build_record(ledger, store, id)["trials"] if t["pareto"]}


def after_run(ledger: Ledger, store: Store, experiment: Experiment, record: dict[str, Any]) -> str | None:
    """Frees what `store.keep` and `store.limit_gb` ask for when a sweep has ended. Returns what to tell, if anything.

    `store.keep` holds for what is this sweep's alone; the limit is on the store as a whole.
    """
    from pare.orchestrator import housekeeping

    options = experiment.store
    if options.keep == "all" and options.limit_gb is None:
        return None
    known = ledgers(ledger, store)
    theirs = {fp for trial in known.trials if trial.sweep != record["sweep"] for fp in trial.goals.get("tasks", [])}
    front = {(record["sweep"], t["trial"]) for t in record["trials"] if t["pareto"]}
    limit = options.limit_gb * 1e9 if options.limit_gb is not None else None
    done = housekeeping.gc(store, known, options.keep, None, False, front, spared=theirs)
    if limit is not None and done["after_bytes"] > limit:
        more = housekeeping.gc(store, known, "all", limit, False)
        done = {**more, "before_bytes": done["before_bytes"]}
    asked = f"store.keep={options.keep}" + (f", store.limit_gb={options.limit_gb:g}" if limit is not None else "")
    return f"{asked}: {in_words(done)}"


def stop(arguments: argparse.Namespace, home: Path) -> int:
    """Asks the driver that works in this home to end, and waits until it has."""
    from pare.orchestrator import places

    driver = driver_of(home)
    if driver is None:
        say(f"no driver is at work in {home}: nothing to stop")
        return 0
    if arguments.sweep:
        ledger = places.ledger_of(home)
        wanted, running = ledger.find_sweep(arguments.sweep)["id"], ledger.sweeps()[0]["id"]
        if wanted != running:
            raise ConfigError(f"the driver at work in {home} is at sweep {running}, not at {wanted}. Try: pare stop {running}")
    since = time.monotonic()
    for n in range(2 if arguments.now else 1):
        time.sleep(POLL_S * n)  # two signals at once would be one
        try:
            driver.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            break
    say(f"process {driver.pid} was asked to stop" + ("" if arguments.now else "; what runs saves its state and ends"))
    while driver_of(home) == driver:
        if arguments.now and time.monotonic() - since > PATIENCE_S:
            raise PareError(f"process {driver.pid} has not ended within {PATIENCE_S:g} s. Try: kill -9 {driver.pid}")
        time.sleep(POLL_S)
    say("it has ended; what is finished is kept. Go on with: pare resume")
    return 0


def driver_of(home: Path) -> psutil.Process | None:
    """The process that holds the driver's lock of a home on this machine.

    Raises:
        PareError: somebody holds it whom this machine does not know.
    """
    try:
        handle = os.open(home / "driver.lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        said = os.read(handle, 64).decode().strip()
    finally:
        os.close(handle)
    lock = str((home / "driver.lock").resolve())
    try:
        process = psutil.Process(int(said))
        if any(file.path == lock for file in process.open_files()):
            return process
    except (ValueError, psutil.Error):
        pass
    raise PareError(f"{lock} is held by process {said or '?'}, which does not run on this machine. Stop it where it runs")


def sync(arguments: argparse.Namespace, home: Path) -> int:
    """Empties the outbox."""
    from pare.orchestrator import outbox

    sent, left, problems = outbox.sync(home, arguments.sweep)
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, "sent": sent, "left": left, "problems": problems})
    else:
        print(f"{sent} rows told to MLflow, {left} left")
        for problem in problems:
            say(problem)
    return 6 if left or problems else 0
