"""Segments of the ledger in the store: what was committed is found again by a machine that has only the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator import segments
from pare.orchestrator.errors import ConfigError, LedgerError
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.segments import Segments
from pare.workers.store import Store

TASKS = ["aa", "bb"]


def begin(home: Path, sweep: str = "s") -> tuple[Ledger, int]:
    """A ledger in which a sweep of one trial has begun."""
    ledger = Ledger(home, write=True)
    run = ledger.start_run(sweep, sweep, "pare run", {"common": {}}, 2, 2, 0)
    row = {"name": "t", "block": "t", "recipe": "r", "overrides": {}, "config": {"a": 1}, "goals": {"tasks": TASKS}}
    ledger.put_trial(sweep, 0, {**row, "status": "pending", "failure": None})
    for fingerprint in TASKS:
        ledger.put_task(fingerprint, "kind", f"label {fingerprint}", {"type": "kind"}, "pending")
    ledger.commit()
    return ledger, run


def do(ledger: Ledger, run: int, fingerprint: str) -> None:
    attempt = ledger.start_attempt(fingerprint, run)
    reply = {"ok": True, "fingerprint": fingerprint, "digest": "d", "result": {"n": 1}, "cost": {"wall_s": 2.0}}
    ledger.end_attempt(attempt, run, reply)
    ledger.commit()


def contents(ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    return {
        table: sorted((dict(row) for row in ledger.rows(f"SELECT * FROM {table}")), key=str)
        for table in ("sweep", "run", "trial", "task", "attempt")
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_ledger_made_from_the_segments_says_the_same(tmp_path: Path, store: Store) -> None:
    ledger, run = begin(tmp_path / "one")
    written = Segments(ledger, store.blobs, "s")
    written.write()
    for fingerprint in TASKS:
        do(ledger, run, fingerprint)
        written.write(at_once=True)
    ledger.set_trial("s", "t", "done")
    ledger.end_run(run, "done")
    ledger.commit()
    written.write(at_once=True)

    segments.pull(store, tmp_path / "two")

    assert contents(Ledger(tmp_path / "two")) == contents(ledger)
    assert len(store.blobs.list("ledger")) == 4


def test_the_next_driver_writes_all_anew_what_a_crash_kept_back_included(tmp_path: Path, store: Store) -> None:
    ledger, run = begin(tmp_path / "one")
    Segments(ledger, store.blobs, "s").write()
    do(ledger, run, "aa")
    ledger.close()  # before a segment was written

    again = Ledger(tmp_path / "one", write=True)
    Segments(again, store.blobs, "s").write()
    segments.pull(store, tmp_path / "two")

    assert [row["status"] for row in Ledger(tmp_path / "two").tasks(TASKS).values()] == ["done", "pending"]
    assert [Path(key).name for key in store.blobs.list("ledger")] == ["00000002.jsonl"]


def test_between_two_segments_goes_some_time_unless_it_has_to_be_at_once(tmp_path: Path, store: Store) -> None:
    ledger, run = begin(tmp_path / "one")
    written = Segments(ledger, store.blobs, "s")
    for fingerprint in TASKS:
        written.write()
        do(ledger, run, fingerprint)
    assert len(store.blobs.list("ledger")) == 1
    written.write(at_once=True)
    assert len(store.blobs.list("ledger")) == 2


def test_of_two_drivers_what_one_has_done_stays_done(tmp_path: Path, store: Store) -> None:
    (a, run), (b, _) = begin(tmp_path / "one"), begin(tmp_path / "two")
    do(a, run, "aa")
    Segments(a, store.blobs, "s").write()
    Segments(b, store.blobs, "s").write()  # later, and knows nothing of it

    segments.pull(store, tmp_path / "three")

    assert Ledger(tmp_path / "three").tasks(["aa"])["aa"]["status"] == "done"
    assert {row["fingerprint"]: row["status"] for row in segments.rows(store.blobs)["task"]} == {"aa": "done", "bb": "pending"}
    assert len(Ledger(tmp_path / "three").rows("SELECT * FROM run")) == 2


def test_rows_of_another_sweep_stay_with_it(tmp_path: Path, store: Store) -> None:
    ledger, _ = begin(tmp_path / "one", "s")
    ledger.close()
    ledger, _ = begin(tmp_path / "one", "other")
    Segments(ledger, store.blobs, "other").write()

    segments.pull(store, tmp_path / "two")

    assert [row["id"] for row in Ledger(tmp_path / "two").sweeps()] == ["other"]


def test_a_damaged_segment_a_newer_one_and_none_at_all_are_errors_that_say_so(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match="knows no sweep yet"):
        segments.pull(store, tmp_path / "two")
    ledger, _ = begin(tmp_path / "one")
    Segments(ledger, store.blobs, "s").write()
    with pytest.raises(ConfigError, match="knows no sweep 'x'; there is: s"):
        segments.pull(store, tmp_path / "two", "x")
    (key,) = store.blobs.list("ledger")
    whole = store.blobs.read(key)

    store.blobs.write(key, whole[:-5])
    with pytest.raises(LedgerError, match=r"segment ledger/s/.* is damaged"):
        segments.pull(store, tmp_path / "two")
    head, rest = whole.split(b"\n", 1)
    store.blobs.write(key, json.dumps({**json.loads(head), "format": 9}).encode() + b"\n" + rest)
    with pytest.raises(LedgerError, match="has format 9, this version of Pare reads 1"):
        segments.pull(store, tmp_path / "two")
