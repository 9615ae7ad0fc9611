"""Where the artifacts and the ledger of a sweep are, for every verb that reads one or goes on with one; and what names of the
hub stood for, which is kept beside the artifacts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pare.orchestrator.ledger import Ledger
from pare.workers.hub import Memory
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


def remembered_names(open_store: Callable[[], Store]) -> Memory:
    """What the store knows of names of the hub. It is opened when the hub gives no answer, and not before."""

    def read(key: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(open_store().blobs.read(name_key(key)))
        except FileNotFoundError:
            return None
        return found

    return Memory(read)


def remember_names(store: Store, names: Mapping[str, dict[str, Any]]) -> None:
    """Keeps what names stand for; of a name that is known already, what it stands for now."""
    for key, known in names.items():
        store.blobs.write(name_key(key), json.dumps(known, sort_keys=True).encode())


def name_key(key: str) -> str:
    return f"hub/{key.replace('/', '--').replace(' ', '--')}.json"
