"""The outbox: what MLflow has not been told yet. A table of the ledger, filled by the driver and emptied by one thread.

A row says that something is worth telling: kind "trial" (this trial's outcome changed), "sweep" (the sweep began or
ended), "point" ({name, step, value}: a point of a curve of a running trial). Only points carry what they tell; the rest
is read from ledger and store when its turn comes. A row goes when MLflow has answered, so what is cut off is told again;
told twice, it stands there once (see `tracking.mlflow_log`).
"""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from pare.orchestrator.ledger import Ledger
from pare.orchestrator.record import build_record, one_trial, record_head, trial_uid
from pare.tracking.mlflow_log import MlflowTracker, TrackingError, redacted
from pare.workers.store import Store

POLL_S = 1.0
"""Between two looks into the outbox: what happened reaches a server that answers within this and the time of the calls."""
PAGE = 500
"""Rows that are read, gathered by run, told and taken away together."""
LONGEST_PAUSE_S, LAST_PAUSE_S = 30.0, 2.0
"""Between two tries at a server that is away: while the sweep runs, and when only tracking is left to be done."""
PATIENCE_S = 20.0
"""How long the end of a sweep waits for the next success of a server that is slow or away."""

OWN = "SELECT id FROM outbox WHERE sweep = ? AND uid = '' AND id <= ?"


class Tracker:
    """Tells MLflow about one sweep from a thread of its own: a slow or dead server never slows a trial."""

    def __init__(self, home: Path, sweep: str, store: Store, place: tuple[str, Path, str], enabled: bool = True) -> None:
        """place: (tracking URI, artifact root, experiment name), see `tracking_place`."""
        self.home, self.sweep, self.store, self.enabled = home, sweep, store, enabled
        self.sink = MlflowTracker(*place)
        self.problem: str | None = None
        self.sent = 0
        self._refused: dict[str, str] = {}  # uid -> why MLflow, which answered, did not take it
        self._record: dict[str, Any] | None = None
        self._names: dict[str, str] = {}  # uid -> name of the trial
        self._users: dict[str, int] = {}  # fingerprint of a task -> number of trials that need it
        self._succeeded = time.monotonic()
        self._ending, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tracker", daemon=True)

    def start(self) -> None:
        """Begins to look into the outbox. MLflow is imported when there is something to tell."""
        if self.enabled:
            self._thread.start()

    def finish(
        self, record: dict[str, Any] | None, patience_s: float = PATIENCE_S, say: Callable[[str], None] | None = None
    ) -> str | None:
        """Waits until MLflow says what `record` says (None: read it from the ledger), as long as there is progress.

        To be called after the driver's last commit. Returns what to tell the user if tracking stays behind, else None.
        """
        if not self.enabled:
            return None
        if not self._thread.is_alive():
            self.start()
        began = self._succeeded = time.monotonic()
        self._record = record
        self._ending.set()
        while self._thread.is_alive() and time.monotonic() - self._succeeded < patience_s:
            self._thread.join(0.1)
            if say and time.monotonic() - began > 3:
                say(f"MLflow is being brought up to date, {rows_left(self.home, self.sweep)} rows to go; Ctrl-C leaves them")
                say = None
        self._given_up.set()
        left = rows_left(self.home, self.sweep)
        if not left and not self.problem and not self._thread.is_alive():
            return None
        why = self.problem or f"{redacted(self.sink.uri)} takes more than {patience_s:g} s for an answer"
        waiting = "1 row waits" if left == 1 else f"{left} rows wait"
        return f"tracking is behind: {waiting} in the outbox. {why}\nNext, when that is mended:\n  pare sync {self.sweep}"

    def drain(self, ending: bool = False, dead: bool = False) -> None:
        """One pass: tells what is in the outbox and empties it; `ending` a sweep, also what its record says as a whole.

        dead: no driver is at work, so what says that it runs was interrupted. A TrackingError leaves the rest for later.
        """
        if ending:
            self._refused.clear()
        with closing(outbox(self.home)) as box, closing(Ledger(self.home)) as ledger:
            last = 0
            while page := box.execute(
                "SELECT * FROM outbox WHERE sweep = ? AND id > ? ORDER BY id LIMIT ?", (self.sweep, last, PAGE)
            ).fetchall():
                last = page[-1]["id"]
                self._tell(box, ledger, page, dead)
            if ending:
                record = told_as(self._record or build_record(ledger, self.store, self.sweep), dead)
                directory = self.home / "sweeps" / self.sweep
                self.sink.sync(record, directory if directory.is_dir() else None, self._progress)
                self._remove(box, [(row["id"],) for row in box.execute(OWN, (self.sweep, last))])
        if self._refused:
            raise TrackingError("; ".join(dict.fromkeys(self._refused.values())), only_this=True)

    def _loop(self) -> None:
        failures = 0
        while not self._given_up.is_set():
            ending = self._ending.is_set()
            try:
                self.drain(ending)
                failures, self.problem = 0, None
            except TrackingError as error:
                self.problem = str(error)
                failures = 0 if error.only_this else failures + 1
            except Exception as error:  # a locked ledger, a damaged artifact: told at the end like a server that is away
                self.problem = f"{type(error).__name__}: {redacted(str(error))}"
                failures += 1
            if ending and not failures:
                return
            pause = min(2.0**failures, LAST_PAUSE_S if ending else LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
            (self._given_up if ending else self._ending).wait(pause if failures else POLL_S)

    def _tell(self, box: sqlite3.Connection, ledger: Ledger, page: list[sqlite3.Row], dead: bool) -> None:
        """Tells MLflow what these rows are about, each run once, the sweep's own first, and takes away the rows."""
        head = told_as(record_head(ledger, self.sweep), dead)
        by_run: dict[str, list[sqlite3.Row]] = {}
        for row in page:
            by_run.setdefault(row["uid"], []).append(row)
        told: list[tuple[int]] = []
        try:
            for uid in sorted(by_run, key=bool):
                try:
                    if uid in self._refused:
                        continue
                    if uid:
                        self._tell_trial(ledger, head, uid, by_run[uid])
                    elif head["about"]["status"] == "running":
                        self.sink.write_sweep(head)
                    else:
                        continue  # how it ended is told with the whole record
                except TrackingError as error:
                    if not error.only_this:
                        raise
                    self._refused[uid] = str(error)
                    continue
                self._progress()
                told += [(row["id"],) for row in by_run[uid]]
        finally:
            self._remove(box, told)

    def _tell_trial(self, ledger: Ledger, head: dict[str, Any], uid: str, rows: list[sqlite3.Row]) -> None:
        points = [json.loads(row["body"]) for row in rows if row["kind"] == "point"]
        known = [(point["name"], point["step"], point["value"]) for point in points if point["value"] is not None]
        if known and not self.sink.write_points(self.sweep, uid, known):
            running = {**head, "about": {**head["about"], "status": "running"}}
            self.sink.write_trial(running, self._trial(ledger, uid) | {"status": "running"})
            self.sink.write_points(self.sweep, uid, known)
        if len(points) < len(rows):
            self.sink.write_trial(head, self._trial(ledger, uid))

    def _trial(self, ledger: Ledger, uid: str) -> dict[str, Any]:
        if uid not in self._names:
            rows = ledger.rows("SELECT name FROM trial WHERE sweep = ?", self.sweep)
            self._names = {trial_uid(self.sweep, row["name"]): row["name"] for row in rows}
        if uid not in self._names:
            raise TrackingError(f"the outbox speaks of a trial {uid} that sweep {self.sweep} does not have", only_this=True)
        return one_trial(ledger, self.store, self.sweep, self._names[uid], self._users)

    def _remove(self, box: sqlite3.Connection, rows: list[tuple[int]]) -> None:
        with box:
            box.executemany("DELETE FROM outbox WHERE id = ?", rows)
        self.sent += len(rows)

    def _progress(self) -> None:
        self._succeeded = time.monotonic()


def sync(home: Path, sweep: str | None = None, store: Store | None = None) -> tuple[int, int, list[str]]:
    """Empties the outbox of a sweep, or of all that are tracked, and makes MLflow say what the ledger says: `pare sync`.

    Returns rows sent, rows left, and what kept them back. A sweep whose driver died is told as interrupted. Refuses
    (BusyError) while a driver is at work, for that one tracks by itself.
    """
    Ledger(home).close()  # says so where there is none, instead of making one
    sent, left, problems = 0, 0, []
    with closing(Ledger(home, write=True)) as ledger:
        chosen = [ledger.find_sweep(sweep)] if sweep else ledger.sweeps()
        for row in chosen:
            place = json.loads(row["about"]).get("tracking", {"uri": None, "experiment": "pare"})
            if place is None and not sweep:
                continue  # it was run with tracking.enabled=false; named, it is told all the same
            wanted = tracking_place(home, **(place or {}))
            tracker = Tracker(home, row["id"], store or Store(home / "store"), wanted)
            try:
                tracker.drain(ending=True, dead=True)
            except TrackingError as error:
                problems.append(f"{row['id']}: {error}")
            sent += tracker.sent
            left += rows_left(home, row["id"])
    return sent, left, problems


def tracking_place(home: Path, uri: str | None = None, experiment: str = "pare") -> tuple[str, Path, str]:
    """(tracking URI, artifact root, experiment name); the environment wins over the config."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI") or uri or "auto",
        (home / "mlartifacts").absolute(),
        os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment,
    )


def place_to_keep(uri: str | None, experiment: str) -> dict[str, Any]:
    """What the ledger keeps for `pare sync`: where a sweep is tracked, without user and password.

    What the environment says now is kept with it, so `pare sync` finds the place from a shell that does not say it.
    """
    found, _, name = tracking_place(Path(), uri, experiment)
    return {"uri": re.sub(r"://[^/\s]*@", "://", found), "experiment": name}


def told_as(record: dict[str, Any], dead: bool) -> dict[str, Any]:
    """The record; of a sweep whose driver died, that it was interrupted, nobody knows when."""
    if not dead or record["about"]["status"] != "running":
        return record
    return {**record, "about": {**record["about"], "status": "interrupted", "wall_s": None}}


def outbox(home: Path) -> sqlite3.Connection:
    """A connection for the calling thread. It waits for the driver's commits; it does not flush, for a row told twice is
    harmless."""
    box = sqlite3.connect(home / "ledger.db", timeout=30)
    box.row_factory = sqlite3.Row
    box.execute("PRAGMA synchronous=NORMAL")
    return box


def rows_left(home: Path, sweep: str) -> int:
    with closing(outbox(home)) as box:
        return int(box.execute("SELECT COUNT(*) FROM outbox WHERE sweep = ?", (sweep,)).fetchone()[0])
