"""Places that cannot be used: full, read-only, of a newer Pare, in the hands of another driver. Each says so."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator import cli, drive, engine
from pare.orchestrator.errors import BusyError
from pare.orchestrator.lease import Leases
from pare.orchestrator.ledger import Ledger
from pare.workers.store import Store, StoreError
from tests.orchestrator import pretend

SWEEP = ("recipe=rtn", "model=tiny", "evaluation.questions.n=0")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """run(words...) -> (exit code, what stood on stderr) of `pare run` with a worker that pretends."""
    monkeypatch.setenv("PARE_HOME", str(tmp_path / "home"))

    def pare(*words: str) -> tuple[int, str]:
        with pretend.pretending():
            code = cli.main(["run", *SWEEP, *pretend.QUIET, *words])
        return code, capsys.readouterr().err

    return pare


def test_a_store_of_a_newer_format_is_left_alone(run: Any, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "format").write_text('{"format": 99}')

    code, error = run(f"store.url={tmp_path / 'new'}")

    assert code == 8
    assert "has format 99, this Pare reads format" in error
    assert "Use the Pare that wrote it" in error
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["format"]


def test_a_ledger_of_another_format_is_left_alone(run: Any, tmp_path: Path) -> None:
    Ledger(tmp_path / "home", write=True).close()
    with sqlite3.connect(tmp_path / "home" / "ledger.db") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'format'")

    code, error = run()

    assert code == 8
    assert "has format 99" in error
    assert "artifacts in the store are kept" in error


def test_a_store_that_may_not_be_written_is_said_to(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.mkdir

    def refused(path: Any, *more: Any, **named: Any) -> None:
        if "shared" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", refused)  # this may run as root, whom no permission stops
    code, error = run(f"store.url={tmp_path / 'shared'}")

    assert code == 4
    assert "this user may not write" in error
    assert "store.url=" in error
    assert "Traceback" not in error


def test_a_disk_that_fills_up_fails_the_trial_by_name_and_room_lets_it_go_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Store.publish

    def full(self: Store, directory: Path, fingerprint: str, kind: str, result: Any, cost: Any) -> Any:
        if kind == "export":
            raise StoreError(errno.ENOSPC, f"store {self.location}, publishing: it is full. Make room")
        return publish(self, directory, fingerprint, kind, result, cost)

    monkeypatch.setattr(Store, "publish", full)
    code, error = run()
    assert code == 3
    assert "disk_full" in error
    assert "it is full. Make room" in error
    assert not list((tmp_path / "home" / "store" / "attempts").iterdir())

    monkeypatch.setattr(Store, "publish", publish)
    assert run()[0] == 0


def test_a_full_disk_under_the_ledger_ends_the_driver_with_the_line_to_go_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Ledger.write

    def full(self: Ledger, statement: str, *more: Any) -> Any:
        if "INSERT INTO attempt" in statement:
            with self._explained():
                raise sqlite3.OperationalError("database or disk is full")
        return written(self, statement, *more)

    monkeypatch.setattr(Ledger, "write", full)
    code, error = run()

    assert code == 8
    assert "database or disk is full. Make room on its disk" in error
    assert "Go on with:" in error
    monkeypatch.setattr(Ledger, "write", written)
    assert run()[0] == 0


def test_what_is_to_run_again_must_not_be_in_the_hands_of_another_driver(tmp_path: Path) -> None:
    shared = (*SWEEP, f"store.url={tmp_path / 'shared'}")
    experiment, plan = pretend.prepared(shared)
    assert pretend.sweep(tmp_path / "home", shared) == 0
    (trial,) = plan.goals
    artifact = plan.goals[trial].artifact
    store = Store(tmp_path / "shared")
    other = Leases(store.blobs, "other")
    assert other.take(artifact)

    with (
        pretend.pretending(),
        pytest.raises(BusyError, match=f"'rtn {trial}' is being made by another driver, process {os.getpid()}"),
    ):
        drive.run(experiment, plan, "cpu", tmp_path / "home", "pare rerun", again=[artifact])

    other.release(artifact)
    with pretend.pretending():
        assert drive.run(experiment, plan, "cpu", tmp_path / "home", "pare rerun", again=[artifact]) == 0


def test_a_driver_says_whom_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = (*SWEEP, f"store.url={tmp_path / 'shared'}")
    _, plan = pretend.prepared(shared)
    first = next(iter(plan.tasks))
    other = Leases(Store(tmp_path / "shared").blobs, "other")
    assert other.take(first)
    look = engine.Engine.look_elsewhere

    def then_it_ends(self: engine.Engine, listener: Any) -> None:
        if self.elsewhere:
            other.close()
        look(self, listener)

    monkeypatch.setattr(engine.Engine, "look_elsewhere", then_it_ends)
    assert pretend.sweep(tmp_path / "home", shared) == 0

    said = capsys.readouterr().err
    assert f"another driver is at it: process {os.getpid()} on " in said
    assert [label for label, status in pretend.attempts(tmp_path / "home") if status == "done"].count("import tiny") == 1


def test_two_drivers_in_one_home_are_one_too_many(run: Any, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "home", write=True)
    try:
        code, error = run()
    finally:
        ledger.close()

    assert code == 7
    assert f"process {os.getpid()}" in error


def test_a_damaged_ledger_is_made_anew_from_the_store(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run()[0] == 0
    before = pretend.table(tmp_path / "home")
    (tmp_path / "home" / "ledger.db").write_bytes(b"no database" * 1000)
    code, error = run()
    assert code == 8
    assert "cannot be read as a ledger" in error

    for file in (tmp_path / "home").glob("ledger.db*"):
        file.unlink()
    assert cli.main(["report", "--store", str(tmp_path / "home" / "store"), "--json"]) == 0
    assert json.dumps(json.loads(capsys.readouterr().out)["trials"], sort_keys=True).encode() == before
