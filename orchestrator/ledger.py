"""The ledger: what was asked for, what was tried, what came out. SQLite, one writer (the driver), the truth.

MLflow, reports and `pare status` are projections of it. A task is done when its artifact is in the store; the ledger
row follows the publication, and the next driver copies it from the manifest after a crash in between. Writes gather in
one transaction until `commit`, so that a thousand small tasks do not wait for a thousand flushes of the disk.

`changed` collects which rows were written: `segments` takes them from there into the store, for readers elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pare.orchestrator.errors import BusyError, ConfigError, LedgerError, nearest

FORMAT = "2"

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS sweep (id TEXT PRIMARY KEY, name TEXT, command TEXT, created REAL, about TEXT);
CREATE TABLE IF NOT EXISTS run (id INTEGER PRIMARY KEY, sweep TEXT, started REAL, finished REAL, status TEXT, driver TEXT,
  total_if_separate INTEGER, unique_tasks INTEGER, executed INTEGER DEFAULT 0, cached INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS trial (sweep TEXT, name TEXT, position INTEGER, block TEXT, recipe TEXT, overrides TEXT, config TEXT,
  goals TEXT, status TEXT, failure TEXT, PRIMARY KEY (sweep, name));
CREATE TABLE IF NOT EXISTS task (fingerprint TEXT PRIMARY KEY, type TEXT, label TEXT, record TEXT, status TEXT, digest TEXT,
  result TEXT, cost TEXT, finished REAL);
CREATE TABLE IF NOT EXISTS attempt (id INTEGER PRIMARY KEY, fingerprint TEXT, run INTEGER, number INTEGER, started REAL,
  finished REAL, status TEXT, failure TEXT, message TEXT, cost TEXT, estimate TEXT);
CREATE TABLE IF NOT EXISTS tracked (sweep TEXT PRIMARY KEY, digest TEXT);
CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY, sweep TEXT, uid TEXT, kind TEXT, body TEXT);
CREATE INDEX IF NOT EXISTS attempt_of ON attempt (fingerprint);
"""

_last_id = 0

Change = tuple[str, str, str | int]
"""(table, sweep or nothing, key): a row that was written."""


class Ledger:
    """Read and write access. Only a driver that holds the lock writes (`Ledger(home, write=True)`)."""

    def __init__(self, home: Path, write: bool = False) -> None:
        self.path = home / "ledger.db"
        self._lock: int | None = None
        self.changed: dict[Change, None] = {}
        if write:
            home.mkdir(parents=True, exist_ok=True)
            self._take_lock(home)
        elif not self.path.exists():
            raise ConfigError(
                f"there is no sweep in {home} yet. Try: pare run experiment=demo   (PARE_HOME chooses another place)"
            )
        try:
            self.db = sqlite3.connect(self.path, isolation_level=None)
            self.db.row_factory = sqlite3.Row
            if write:
                self.db.execute("PRAGMA journal_mode=WAL")
                self.db.execute("PRAGMA synchronous=FULL")
                self.db.executescript(TABLES)
                self.db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (FORMAT,))
                self.db.execute("INSERT OR IGNORE INTO meta VALUES ('id', ?)", (secrets.token_hex(8),))
            found = self.db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()[0]
        except sqlite3.DatabaseError as e:
            raise LedgerError(
                f"{self.path} cannot be read as a ledger: {e}. Move it away; artifacts in the store are kept."
            ) from e
        if found != FORMAT:
            raise LedgerError(
                f"{self.path} has format {found}, this version of Pare reads format {FORMAT}. Move it away, or choose another "
                "PARE_HOME; artifacts in the store are kept."
            )
        self.id: str = self.db.execute("SELECT value FROM meta WHERE key = 'id'").fetchone()[0]
        """Tells this ledger, and so the driver that writes it, from others."""

    def _take_lock(self, home: Path) -> None:
        self._lock = os.open(home / "driver.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 64).decode().strip() or "unknown"
            os.close(self._lock)
            raise BusyError(
                f"another `pare run` (process {holder}) works in {home}. Wait for it, or set PARE_HOME to another directory; "
                "`pare status` shows how far it is."
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def close(self) -> None:
        """Commits what was written, and lets the next driver in."""
        self.commit()
        self.db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self.db.execute(query, values).fetchall()

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, statement: str, values: tuple[Any, ...] = (), changes: Change | None = None) -> None:
        """Part of the transaction that the next `commit` ends. changes: the row, where others are told of it."""
        with self._explained():
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
            self.db.execute(statement, values)
        if changes:
            self.changed[changes] = None

    def commit(self) -> None:
        """Puts on the disk, at once and whole, what was written since the last time."""
        with self._explained():
            if self.db.in_transaction:
                self.db.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as e:
            raise LedgerError(
                f"{self.path} cannot be written: {e}. Make room on its disk and see to it that this user may write there, or "
                "choose another PARE_HOME. What is in the store is kept; the same command goes on from there."
            ) from e

    def start_run(
        self, sweep: str, name: str, command: str, about: dict[str, Any], unique: int, separate: int, cached: int
    ) -> int:
        """Records that a driver took up a sweep; what this ledger's dead drivers were at becomes `lost`."""
        for row in self.rows("SELECT id, sweep FROM run WHERE status = 'running' AND driver = ?", self.id):
            for attempt in self.rows("SELECT id FROM attempt WHERE status = 'running' AND run = ?", row["id"]):
                self.write(
                    "UPDATE attempt SET status = 'lost', failure = 'lost_driver', finished = ? WHERE id = ?",
                    (now(), attempt["id"]),
                    ("attempt", "", attempt["id"]),
                )
            self.write("UPDATE run SET status = 'interrupted' WHERE id = ?", (row["id"],), ("run", "", row["id"]))
            self.no_trial_runs(row["sweep"])
        self.write(
            "INSERT INTO sweep VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET command = excluded.command, about = excluded.about",
            (sweep, name, command, now(), json.dumps(about)),
            ("sweep", "", sweep),
        )
        run = new_id()
        self.write(
            "INSERT INTO run (id, sweep, started, status, driver, total_if_separate, unique_tasks, cached) "
            "VALUES (?, ?, ?, 'running', ?, ?, ?, ?)",
            (run, sweep, now(), self.id, separate, unique, cached),
            ("run", "", run),
        )
        return run

    def end_run(self, run: int, status: str) -> None:
        self.write("UPDATE run SET status = ?, finished = ? WHERE id = ?", (status, now(), run), ("run", "", run))
        (row,) = self.rows("SELECT sweep FROM run WHERE id = ?", run)
        self.no_trial_runs(row["sweep"])

    def no_trial_runs(self, sweep: str) -> None:
        """Trials that were under way when their driver ended wait for the next one."""
        for trial in self.rows("SELECT name FROM trial WHERE status = 'running' AND sweep = ?", sweep):
            self.set_trial(sweep, trial["name"], "pending")

    def count_cached(self, run: int, n: int) -> None:
        """So many tasks more need not run."""
        self.write("UPDATE run SET cached = cached + ? WHERE id = ?", (n, run), ("run", "", run))

    def put_trial(self, sweep: str, position: int, trial: dict[str, Any]) -> None:
        self.write(
            "INSERT INTO trial VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (sweep, name) DO UPDATE SET position = excluded.position, overrides = excluded.overrides, "
            "config = excluded.config, goals = excluded.goals, status = excluded.status, failure = excluded.failure",
            (
                sweep,
                trial["name"],
                position,
                trial["block"],
                trial["recipe"],
                json.dumps(trial["overrides"]),
                json.dumps(trial["config"]),
                json.dumps(trial["goals"]),
                trial["status"],
                json.dumps(trial["failure"]),
            ),
            ("trial", sweep, trial["name"]),
        )

    def set_trial(self, sweep: str, name: str, status: str, failure: dict[str, Any] | None = None) -> None:
        self.write(
            "UPDATE trial SET status = ?, failure = ? WHERE sweep = ? AND name = ?",
            (status, json.dumps(failure), sweep, name),
            ("trial", sweep, name),
        )

    def set_goals(self, sweep: str, name: str, goals: dict[str, Any]) -> None:
        statement = "UPDATE trial SET goals = ? WHERE sweep = ? AND name = ?"
        self.write(statement, (json.dumps(goals), sweep, name), ("trial", sweep, name))

    def put_task(self, fingerprint: str, kind: str, label: str, record: dict[str, Any], status: str) -> None:
        self.write(
            "INSERT INTO task (fingerprint, type, label, record, status) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (fingerprint) DO UPDATE SET status = excluded.status",
            (fingerprint, kind, label, json.dumps(record), status),
            ("task", "", fingerprint),
        )

    def start_attempt(self, fingerprint: str, run: int, estimate: Any = None) -> int:
        """estimate: a dataclass of what the attempt was expected to cost."""
        number = self.rows("SELECT COUNT(*) FROM attempt WHERE fingerprint = ?", fingerprint)[0][0] + 1
        attempt = new_id()
        self.write(
            "INSERT INTO attempt (id, fingerprint, run, number, started, status, estimate) "
            "VALUES (?, ?, ?, ?, ?, 'running', ?)",
            (attempt, fingerprint, run, number, now(), json.dumps(vars(estimate)) if estimate else None),
            ("attempt", "", attempt),
        )
        self.write("UPDATE task SET status = 'running' WHERE fingerprint = ?", (fingerprint,), ("task", "", fingerprint))
        return attempt

    def end_attempt(self, attempt: int, run: int, reply: dict[str, Any]) -> None:
        """Writes one attempt's outcome and, if it went well, the task's result. One that was told to stop is no failure."""
        ok, stopped = reply["ok"], reply.get("failure") == "stopped"
        self.write(
            "UPDATE attempt SET finished = ?, status = ?, failure = ?, message = ?, cost = ? WHERE id = ?",
            (
                now(),
                "done" if ok else "stopped" if stopped else "failed",
                reply.get("failure"),
                reply.get("message"),
                json.dumps(reply.get("cost", {})),
                attempt,
            ),
            ("attempt", "", attempt),
        )
        if ok:
            self.put_result(reply["fingerprint"], reply["digest"], reply["result"], reply["cost"])
            self.write("UPDATE run SET executed = executed + 1 WHERE id = ?", (run,), ("run", "", run))
        else:
            values = ("pending" if stopped else "failed", reply["fingerprint"])
            self.write("UPDATE task SET status = ? WHERE fingerprint = ?", values, ("task", "", reply["fingerprint"]))

    def put_result(self, fingerprint: str, digest: str, result: Any, cost: dict[str, Any]) -> None:
        self.write(
            "UPDATE task SET status = 'done', digest = ?, result = ?, cost = ?, finished = ? WHERE fingerprint = ?",
            (digest, json.dumps(result), json.dumps(cost), now(), fingerprint),
            ("task", "", fingerprint),
        )

    def set_tracked(self, sweep: str, digest: str) -> None:
        self.write("INSERT OR REPLACE INTO tracked VALUES (?, ?)", (sweep, digest))

    # -- reading -------------------------------------------------------------------------------------------------

    def sweeps(self) -> list[sqlite3.Row]:
        """All sweeps, the latest taken up first."""
        return self.rows(
            "SELECT sweep.*, MAX(run.id) AS latest FROM sweep JOIN run ON run.sweep = sweep.id "
            "GROUP BY sweep.id ORDER BY latest DESC"
        )

    def find_sweep(self, wanted: str | None) -> sqlite3.Row:
        """The sweep of that id, or the latest of that name or id prefix; the latest of all if none is named."""
        sweeps = self.sweeps()
        if not sweeps:
            raise ConfigError("there is no sweep yet. Try: pare run experiment=demo")
        for sweep in sweeps:
            if wanted is None or wanted in (sweep["id"], sweep["name"]) or sweep["id"].startswith(wanted):
                return sweep
        raise ConfigError(f"there is no sweep {wanted!r}.{nearest(str(wanted), [s['id'] for s in sweeps])}")

    def last_run(self, sweep: str) -> sqlite3.Row:
        return self.rows("SELECT * FROM run WHERE sweep = ? ORDER BY id DESC LIMIT 1", sweep)[0]

    def trials(self, sweep: str) -> list[sqlite3.Row]:
        return self.rows("SELECT * FROM trial WHERE sweep = ? ORDER BY position", sweep)

    def tasks(self, fingerprints: list[str]) -> dict[str, sqlite3.Row]:
        found = {}
        for start in range(0, len(fingerprints), 500):
            part = fingerprints[start : start + 500]
            marks = ",".join("?" * len(part))
            found.update(
                {row["fingerprint"]: row for row in self.rows(f"SELECT * FROM task WHERE fingerprint IN ({marks})", *part)}
            )
        return found

    def tracked(self, sweep: str) -> str | None:
        row = self.rows("SELECT digest FROM tracked WHERE sweep = ?", sweep)
        return row[0][0] if row else None

    def post(self, sweep: str, uid: str, kind: str, body: dict[str, Any] | None) -> None:
        """Leaves a note for the tracker (see `outbox`); it takes it away when MLflow has it."""
        self.write("INSERT INTO outbox (sweep, uid, kind, body) VALUES (?, ?, ?, ?)", (sweep, uid, kind, json.dumps(body)))


def now() -> float:
    return time.time()


def new_id() -> int:
    """Grows with every call and with time, and no two ledgers make the same: milliseconds, then 20 random bits."""
    global _last_id
    _last_id = max(_last_id + 1, time.time_ns() // 1_000_000 << 20 | secrets.randbits(20))
    return _last_id
