"""The ledger as others see it: numbered segments in the store, from which it is made anew on a machine that never had it.

    ledger/SWEEP/LEDGER/00000007.jsonl     {"format", "at", "whole"}, then a line {"table", "row"} for each row

A segment holds whole rows as they stood. The first that a driver writes holds the sweep as it is in its ledger, whatever a
crash before may have kept from being written; the ones after it hold what has changed, and when a whole one is there those
before it go. Several drivers may work on one sweep, each with a ledger of its own: readers take all segments in the order
in which they were written, and a task that is done stays done.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from pare.orchestrator.errors import ConfigError, LedgerError
from pare.orchestrator.ledger import Change, Ledger, now
from pare.workers.blobs import Blobs
from pare.workers.store import Store

FORMAT = 1
EVERY_S = 5.0
"""Between two segments while a sweep runs."""

KEYS = {"sweep": "id", "run": "id", "task": "fingerprint", "attempt": "id", "trial": "name"}


class Segments:
    """Writes the segments of one sweep."""

    def __init__(self, ledger: Ledger, blobs: Blobs, sweep: str) -> None:
        self.ledger, self.blobs, self.sweep = ledger, blobs, sweep
        self.folder = f"ledger/{sweep}/{ledger.id}"
        self._at = 0.0
        self._number: int | None = None

    def write(self, at_once: bool = False) -> None:
        """Puts what was committed since the last time into the store, at most every few seconds unless it has to be at once."""
        if self._number is not None and not at_once and time.monotonic() - self._at < EVERY_S:
            return
        changed, self.ledger.changed = self.ledger.changed, {}
        if self._number is None:
            old = self.blobs.list(self.folder)
            self._put(int(Path(old[-1]).stem) + 1 if old else 1, rows_of_sweep(self.ledger, self.sweep), whole=True)
            for key in old:
                self.blobs.delete(key)
        elif changed:
            self._put(self._number + 1, changed_rows(self.ledger, changed, self.sweep), whole=False)
        self._at = time.monotonic()

    def _put(self, number: int, rows: Iterable[tuple[str, dict[str, Any]]], whole: bool) -> None:
        lines = [{"format": FORMAT, "at": now(), "whole": whole}, *({"table": table, "row": row} for table, row in rows)]
        self.blobs.write(f"{self.folder}/{number:08d}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._number = number


def rows_of_sweep(ledger: Ledger, sweep: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that a ledger says of a sweep: (table, row)."""
    trials = ledger.trials(sweep)
    fingerprints = sorted({fp for trial in trials for fp in (json.loads(trial["goals"]) or {"tasks": []})["tasks"]})
    yield from (("sweep", dict(row)) for row in ledger.rows("SELECT * FROM sweep WHERE id = ?", sweep))
    yield from (("run", dict(row)) for row in ledger.rows("SELECT * FROM run WHERE sweep = ?", sweep))
    yield from (("trial", dict(row)) for row in trials)
    yield from (("task", dict(row)) for row in ledger.tasks(fingerprints).values())
    query = "SELECT attempt.* FROM attempt JOIN run ON attempt.run = run.id WHERE run.sweep = ?"
    yield from (("attempt", dict(row)) for row in ledger.rows(query, sweep))


def changed_rows(ledger: Ledger, changed: Iterable[Change], sweep: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that were written, as they stand now; those of other sweeps are theirs to publish."""
    for table, of_sweep, key in changed:
        if table == "trial" and of_sweep != sweep:
            continue
        more, values = (" AND sweep = ?", [key, sweep]) if table == "trial" else ("", [key])
        yield from ((table, dict(row)) for row in ledger.rows(f"SELECT * FROM {table} WHERE {KEYS[table]} = ?{more}", *values))


def read(blobs: Blobs, sweep: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, row) from all segments in a store, or from those of one sweep, in the order in which they were written.

    Raises:
        LedgerError: a segment is damaged, or was written by a newer Pare.
    """
    found: list[tuple[float, str, list[dict[str, Any]]]] = []
    for key in blobs.list(f"ledger/{sweep}".rstrip("/")):
        try:
            head, *rows = map(json.loads, blobs.read(key).splitlines())
            found.append((head["at"], key, rows))
        except FileNotFoundError:  # its driver has written a whole one in the meantime, which is not in the list
            return (yield from read(blobs, sweep))
        except (ValueError, KeyError) as e:
            raise LedgerError(
                f"segment {key} in the store is damaged ({e}). Move it away; what it held can be made anew"
            ) from e
        if head["format"] != FORMAT:
            raise LedgerError(f"segment {key} in the store has format {head['format']}, this version of Pare reads {FORMAT}")
    for _, _, rows in sorted(found, key=lambda segment: segment[:2]):
        yield from ((line["table"], line["row"]) for line in rows)


def rows(blobs: Blobs) -> dict[str, list[dict[str, Any]]]:
    """Table -> its rows as they stand after the last segment, of all sweeps in a store."""
    tables: dict[str, dict[Any, dict[str, Any]]] = {table: {} for table in KEYS}
    for table, row in read(blobs):
        key = (row["sweep"], row["name"]) if table == "trial" else row[KEYS[table]]
        if not (table == "task" and is_done(tables[table].get(key)) and not is_done(row)):
            tables[table][key] = row
    return {table: list(found.values()) for table, found in tables.items()}


def is_done(row: Any) -> bool:
    return row is not None and row["status"] == "done"


def pull(store: Store, home: Path, sweep: str = "") -> int:
    """Takes what the segments in a store say into the ledger of `home`, which is made where there is none.

    Returns the number of rows. Refuses (BusyError) while a driver is at work in `home`.
    """
    found = list(read(store.blobs, sweep))
    if not found:
        known = sorted({key.split("/")[1] for key in store.blobs.list("ledger")})
        about = f"no sweep {sweep!r}; there is: {', '.join(known)}" if known else "no sweep yet"
        raise ConfigError(f"the store {store.location} knows {about}")
    with closing(Ledger(home, write=True)) as ledger:
        take(ledger, found)
    return len(found)


def take(ledger: Ledger, found: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Writes rows from segments into a ledger. Columns that it does not have are an error, not a loss."""
    for table, row in found:
        columns = ", ".join(row)
        keep = " WHERE task.status != 'done' OR excluded.status = 'done'" if table == "task" else ""
        key = "sweep, name" if table == "trial" else KEYS[table]
        values = ", ".join(f"{name} = excluded.{name}" for name in row)
        try:
            ledger.write(
                f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(row))}) "
                f"ON CONFLICT ({key}) DO UPDATE SET {values}{keep}",
                tuple(row.values()),
            )
        except sqlite3.OperationalError as e:
            raise LedgerError(f"the segments in the store do not fit this version's ledger ({e})") from e
