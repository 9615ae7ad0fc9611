"""Where the artifacts and the ledger of a sweep are, for every verb that reads one or goes on with one."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pare.orchestrator.ledger import Ledger
from pare.workers.store import Store, open_store

if TYPE_CHECKING:
    from pare.orchestrator.config import Experiment


def store_of(home: Path, sweep: sqlite3.Row | dict[str, Any] | Experiment, url: str | None = None) -> Store:
    """The store of a sweep (its row in the ledger) or of an experiment; `url` where somebody named another way to it."""
    said = json.loads(sweep["about"]).get("store") if isinstance(sweep, sqlite3.Row | dict) else sweep.store.url
    return open_store(url or said or home / "store")


def ledger_of(home: Path, url: str | None = None) -> Ledger:
    """The ledger of `home`, to read. With the URL of a store it takes in first what the ledgers of others left there.

    Raises:
        ConfigError: there is none.
    """
    if url:
        from pare.orchestrator import segments

        segments.pull(open_store(url), home)
    return Ledger(home)


def ledger_if_any(home: Path) -> Ledger | None:
    return Ledger(home) if (home / "ledger.db").exists() else None
