"""The outbox and its one reader: what MLflow was not told is told later, once, and never holds up the driver."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator import outbox
from pare.orchestrator.errors import BusyError
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.outbox import Tracker
from pare.orchestrator.record import build_record, trial_uid
from pare.tracking import mlflow_log
from pare.tracking.mlflow_log import TrackingError
from pare.workers.store import Store
from tests.faulty_proxy import FaultyProxy

SWEEP = "toy-1"
ABOUT = {
    "base": {"name": "toy", "parameters": 1000, "bytes": 2000},
    "data": "text",
    "evaluation": {"test_tokens": 10},
    "versions": {"pare": "0"},
}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables with nothing in them: making them takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow_log.client_of(f"sqlite:///{path}")
    return path


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", *mlflow_log.SECRETS, "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setattr(outbox, "POLL_S", 0.05)
    return tmp_path


class Driver:
    """What a driver writes down about a sweep whose trials share one training task."""

    def __init__(self, home: Path, *trials: str, about: dict[str, Any] | None = None) -> None:
        self.home, self.store = home, Store(home / "store")
        self.ledger = Ledger(home, write=True)
        self.run = self.ledger.start_run(SWEEP, "toy", "pare run toy", {**ABOUT, **(about or {})}, 1, 1, 0)
        self.ledger.put_task("train", "train", "train", {}, "pending")
        for position, name in enumerate(trials):
            own = {role: f"{role}-{name}" for role in ("artifact", "score", "export", "evaluate")}
            self.ledger.put_task(own["evaluate"], "evaluate", "evaluate", {}, "pending")
            goals = {**own, "speed": None, "tasks": ["train", own["evaluate"]]}
            row = {"name": name, "block": "b", "recipe": "r", "overrides": {"x": name}, "config": {}, "goals": goals}
            self.ledger.put_trial(SWEEP, position, {**row, "status": "pending", "failure": None})
        self.post("sweep", "")

    def post(self, kind: str, uid: str, **body: Any) -> None:
        self.ledger.post(SWEEP, uid, kind, body)
        self.ledger.commit()

    def starts(self, name: str) -> None:
        self.ledger.set_trial(SWEEP, name, "running")
        self.post("trial", trial_uid(SWEEP, name))

    def sees(self, step: int, loss: float, *names: str) -> None:
        for name in names:
            self.post("point", trial_uid(SWEEP, name), name="train/loss", step=step, value=loss)

    def trained(self, losses: list[float]) -> None:
        """The training task's artifact is published, with its curve."""
        curve = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
        with self.store.attempt() as directory:
            (directory / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
            self.store.publish(directory, "train", "train", {}, {})
        self.ledger.put_result("train", "d", {"train/loss_last": losses[-1]}, {"wall_s": 3.0})
        self.ledger.commit()

    def ends(self, name: str, ppl: float = 10.0) -> None:
        self.ledger.put_result(f"evaluate-{name}", "d", {"quality/ppl": ppl, "size/bytes": 100.0}, {"wall_s": 1.0})
        self.ledger.set_trial(SWEEP, name, "done")
        self.post("trial", trial_uid(SWEEP, name))

    def over(self, status: str = "done") -> dict[str, Any]:
        self.ledger.end_run(self.run, status)
        self.post("sweep", "")
        return build_record(self.ledger, self.store, SWEEP)

    def dies(self) -> None:
        self.ledger.close()

    def tracker(self, uri: str = "auto") -> Tracker:
        return Tracker(self.home, SWEEP, self.store, (uri, self.home / "mlartifacts", "pare"))

    def left(self) -> int:
        return outbox.rows_left(self.home, SWEEP)


def metric_rows(home: Path) -> list[tuple[str, str, int, float]]:
    """(trial or "", metric, step, value) of every row of the metrics table."""
    with closing(sqlite3.connect(home / "mlflow.db")) as db:
        names = dict(db.execute("SELECT run_uuid, value FROM tags WHERE key = 'pare.trial'"))
        return sorted(
            (names.get(run, ""), key, step, value)
            for run, key, step, value in db.execute("SELECT run_uuid, key, step, value FROM metrics")
        )


def runs(home: Path) -> dict[str, list[str]]:
    """Trial, or "" for the sweep -> statuses of its runs that are not deleted."""
    found: dict[str, list[str]] = {}
    with closing(sqlite3.connect(home / "mlflow.db")) as db:
        names = dict(db.execute("SELECT run_uuid, value FROM tags WHERE key = 'pare.trial'"))
        for run, status in db.execute("SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'"):
            found.setdefault(names.get(run, ""), []).append(status)
    return found


def counted(monkeypatch: pytest.MonkeyPatch, tracker: Tracker) -> list[str]:
    """What is written to the sink from now on, in order: "sweep", names of trials, "points"."""
    said: list[str] = []
    trial, sweep, points = tracker.sink.write_trial, tracker.sink.write_sweep, tracker.sink.write_points
    monkeypatch.setattr(tracker.sink, "write_trial", lambda r, t: (said.append(t["trial"]), trial(r, t))[1])
    monkeypatch.setattr(tracker.sink, "write_sweep", lambda r, d=None: (said.append("sweep"), sweep(r, d))[1])
    monkeypatch.setattr(tracker.sink, "write_points", lambda s, u, p: (said.append("points"), points(s, u, p))[1])
    return said


def test_rows_of_one_trial_are_told_in_one_go_the_sweep_first_and_are_gone_then(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(home, "a", "b")
    for name in ("b", "a", "b"):
        driver.starts(name)
    driver.ends("a")
    driver.post("sweep", "")
    tracker = driver.tracker()
    said = counted(monkeypatch, tracker)

    tracker.drain()

    assert said == ["sweep", "b", "a"]
    assert driver.left() == 0
    assert tracker.sent == 6
    assert runs(home) == {"": ["RUNNING"], "a": ["FINISHED"], "b": ["RUNNING"]}


def test_a_trial_told_before_its_sweep_still_gets_its_parent(home: Path) -> None:
    driver = Driver(home, "a")
    driver.ledger.write("DELETE FROM outbox")
    driver.ends("a")

    driver.tracker().drain()

    with closing(sqlite3.connect(home / "mlflow.db")) as db:
        ((parent,),) = db.execute("SELECT value FROM tags WHERE key = 'mlflow.parentRunId'").fetchall()
        assert db.execute("SELECT name FROM runs WHERE run_uuid = ?", (parent,)).fetchone() == (SWEEP,)


def test_rows_stay_until_mlflow_has_answered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(home, "a", "b")
    driver.ends("a")
    driver.ends("b")
    tracker = driver.tracker()
    write = tracker.sink.write_trial

    def away(record: dict[str, Any], trial: dict[str, Any]) -> None:
        if trial["trial"] == "b":
            raise TrackingError("nobody answers")
        write(record, trial)

    monkeypatch.setattr(tracker.sink, "write_trial", away)
    with pytest.raises(TrackingError, match="nobody answers"):
        tracker.drain()
    with closing(sqlite3.connect(home / "ledger.db")) as db:
        waiting = [uid for (uid,) in db.execute("SELECT uid FROM outbox")]
    monkeypatch.setattr(tracker.sink, "write_trial", write)
    tracker.drain()

    assert waiting == [trial_uid(SWEEP, "b")]
    assert driver.left() == 0


def test_a_crash_between_the_answer_and_the_removal_of_the_row_does_no_harm(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(home, "a")
    driver.starts("a")
    driver.sees(0, 2.5, "a")
    dying = driver.tracker()
    monkeypatch.setattr(dying, "_remove", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        dying.drain()
    before, n_left = metric_rows(home), driver.left()

    driver.tracker().drain()

    assert n_left == 3
    assert driver.left() == 0
    assert metric_rows(home) == before == [("a", "train/loss", 0, 2.5)]
    assert runs(home) == {"": ["RUNNING"], "a": ["RUNNING"]}


def test_points_of_a_task_that_three_trials_share_reach_each_once_live_and_from_the_artifact(home: Path) -> None:
    names, losses = ("a", "b", "c"), [3.0, 2.5, 0.1 + 0.2]
    driver = Driver(home, *names)
    tracker = driver.tracker()
    for name in names:
        driver.starts(name)
    for step, loss in enumerate(losses[:2]):
        driver.sees(step, loss, *names)
    tracker.drain()
    live = metric_rows(home)
    driver.trained(losses)
    for name in names:
        driver.ends(name)
    tracker.drain()
    driver.sees(2, losses[2], *names)  # what is seen late is the same point

    tracker._record = driver.over()
    tracker.drain(ending=True)

    assert live == sorted((name, "train/loss", step, losses[step]) for name in names for step in (0, 1))
    curves = [row for row in metric_rows(home) if row[1] == "train/loss"]
    assert curves == sorted((name, "train/loss", step, loss) for name in names for step, loss in enumerate(losses))
    assert driver.left() == 0


def test_a_point_of_a_run_that_mlflow_does_not_know_makes_the_run(home: Path) -> None:
    driver = Driver(home, "a")
    driver.sees(0, 2.5, "a")

    driver.tracker().drain()

    assert runs(home)["a"] == ["RUNNING"]
    assert metric_rows(home) == [("a", "train/loss", 0, 2.5)]


def test_figures_that_change_while_a_trial_runs_are_told_when_it_has_ended(home: Path) -> None:
    driver = Driver(home, "a")
    tracker = driver.tracker()
    driver.starts("a")
    driver.trained([3.0])
    tracker.drain()
    before = metric_rows(home)
    driver.ends("a")
    tracker.drain()

    assert before == []
    assert [row for row in metric_rows(home) if row[1] == "cost/wall_s"] == [("a", "cost/wall_s", 0, 4.0)]


def test_what_changed_at_the_end_is_written_and_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(home, "small", "worse")
    tracker = driver.tracker()
    driver.ends("small", ppl=10.0)
    driver.ends("worse", ppl=11.0)
    tracker.drain()
    tracker._record = driver.over()
    client: Any = tracker.sink._client
    updated: list[str] = []
    set_terminated = client.set_terminated
    monkeypatch.setattr(client, "set_terminated", lambda run, *a, **k: (updated.append(run), set_terminated(run, *a, **k)))
    monkeypatch.setattr(client, "search_runs", lambda *_a, **_k: pytest.fail("all runs were read again"))

    tracker.drain(ending=True)

    with closing(sqlite3.connect(home / "mlflow.db")) as db:
        front = db.execute("SELECT run_uuid FROM tags WHERE key = 'pare.pareto' AND value = 'true'").fetchall()
    assert len(front) == 1
    assert len(updated) == 2
    assert front[0][0] in updated
    assert ("", "trials/done", 0, 2.0) in metric_rows(home)
    assert runs(home) == {"": ["FINISHED"], "small": ["FINISHED"], "worse": ["FINISHED"]}


def test_one_run_that_mlflow_refuses_keeps_no_other_back_and_is_named_at_the_end(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(home, "a", "b")
    tracker = driver.tracker()
    driver.ends("a")
    driver.ends("b")
    log = tracker.sink._attach

    def refusing(run: Any, wanted: dict[str, Any]) -> None:
        if wanted["name"] == "a":
            raise ValueError("no place for files")
        log(run, wanted)

    monkeypatch.setattr(tracker.sink, "_attach", refusing)
    complaint = tracker.finish(driver.over(), patience_s=5)

    assert complaint is not None
    assert "no place for files" in complaint
    assert runs(home)["b"] == ["FINISHED"]
    assert ("a", "quality/ppl", 0, 10.0) in metric_rows(home), "its figures are told all the same"
    monkeypatch.setattr(tracker.sink, "_attach", log)
    driver.dies()
    assert outbox.sync(home)[1:] == (0, [])


def test_an_artifact_that_cannot_be_read_does_not_end_the_tracker(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(home, "a")
    tracker = driver.tracker()
    read = outbox.one_trial
    monkeypatch.setattr(outbox, "one_trial", lambda *_: (_ for _ in ()).throw(OSError("torn curve")))
    tracker.start()
    driver.ends("a")
    deadline = time.monotonic() + 4
    while tracker.problem is None and time.monotonic() < deadline:
        time.sleep(0.02)
    told = tracker.problem
    monkeypatch.setattr(outbox, "one_trial", read)

    assert told == "OSError: torn curve"
    assert tracker.finish(driver.over()) is None
    assert runs(home)["a"] == ["FINISHED"]


def test_a_run_that_a_person_deleted_is_made_anew(home: Path) -> None:
    driver = Driver(home, "a")
    tracker = driver.tracker()
    driver.starts("a")
    tracker.drain()
    client: Any = tracker.sink._client
    client.delete_run(tracker.sink._runs[SWEEP][trial_uid(SWEEP, "a")].id)
    driver.ends("a")

    assert tracker.finish(driver.over()) is None
    assert runs(home)["a"] == ["FINISHED"]


def test_of_two_runs_with_the_same_tags_the_one_with_content_stays(home: Path) -> None:
    driver = Driver(home, "a")
    first = driver.tracker()
    driver.starts("a")
    first.drain()
    client: Any = first.sink._client
    for _ in range(3):
        tags = {"pare.sweep": SWEEP, "pare.trial_uid": trial_uid(SWEEP, "a"), "pare.trial": "a"}
        client.create_run(first.sink._experiment_id, start_time=1, tags=tags)
    driver.ends("a")

    driver.tracker().drain()

    assert runs(home)["a"] == ["FINISHED"]
    assert ("a", "quality/ppl", 0, 10.0) in metric_rows(home)


def test_what_a_dead_driver_left_running_is_told_as_killed(home: Path) -> None:
    driver = Driver(home, "a", "b", "c", "waiting")
    driver.starts("a")
    driver.starts("c")
    driver.ends("b")
    driver.tracker().drain()
    driver.sees(0, 2.5, "a")
    with pytest.raises(BusyError, match="another `pare run`"):
        outbox.sync(home)
    driver.dies()

    sent, left, problems = outbox.sync(home)

    assert (sent, left, problems) == (1, 0, [])
    assert runs(home) == {"": ["KILLED"], "a": ["KILLED"], "b": ["FINISHED"], "c": ["KILLED"]}
    assert ("a", "train/loss", 0, 2.5) in metric_rows(home)
    before = metric_rows(home)
    assert outbox.sync(home, SWEEP) == (0, 0, [])
    assert metric_rows(home) == before


def test_a_curve_of_a_trial_that_was_never_told_is_kept_after_its_drivers_death(home: Path) -> None:
    driver = Driver(home, "a")
    driver.starts("a")
    driver.sees(0, 2.5, "a")
    driver.dies()

    outbox.sync(home)

    assert runs(home) == {"": ["KILLED"], "a": ["KILLED"]}
    assert [row for row in metric_rows(home) if row[0]] == [("a", "train/loss", 0, 2.5)]


def test_a_sweep_run_without_tracking_is_synced_only_by_name(home: Path) -> None:
    driver = Driver(home, "a", about={"tracking": None})
    driver.ends("a")
    driver.over()
    driver.dies()

    assert outbox.sync(home)[0] == 0
    assert outbox.sync(home, "toy")[0] == 3
    assert runs(home) == {"": ["FINISHED"], "a": ["FINISHED"]}


def test_a_store_that_is_away_holds_the_end_up_for_a_bounded_time_and_the_next_step_is_told(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    driver = Driver(home, "a")
    tracker = driver.tracker()
    tracker.start()
    driver.ends("a")
    record = driver.over()
    start = time.monotonic()

    complaint = tracker.finish(record, patience_s=1.0)

    assert time.monotonic() - start < 3
    assert complaint is not None
    assert complaint.startswith("tracking is behind: 3 rows wait in the outbox. MLflow at sqlite:///")
    assert complaint.endswith(f"pare sync {SWEEP}")
    tracker._thread.join(5)
    assert not tracker._thread.is_alive()


def test_a_tracker_that_is_switched_off_says_and_does_nothing(home: Path) -> None:
    driver = Driver(home, "a")
    tracker = Tracker(home, SWEEP, driver.store, ("auto", home / "mlartifacts", "pare"), enabled=False)
    tracker.start()

    assert tracker.finish(driver.over()) is None
    assert runs(home) == {}


def test_the_environment_says_where_and_the_ledger_keeps_it_without_the_password(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outbox.tracking_place(home, None, "mine") == ("auto", home / "mlartifacts", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p@ss@mlflow.example:5000/x")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")

    assert outbox.tracking_place(home, "sqlite:////y.db", "mine")[::2] == ("https://me:p@ss@mlflow.example:5000/x", "theirs")
    assert outbox.place_to_keep(None, "mine") == {"uri": "https://mlflow.example:5000/x", "experiment": "theirs"}


class Doorkeeper(BaseHTTPRequestHandler):
    """Lets nobody in and remembers with which words they knocked; says them back, as a careless server would."""

    def do_GET(self) -> None:
        said = self.headers.get("Authorization", "")
        self.server.heard.append(said)  # type: ignore[attr-defined]
        body = json.dumps({"error_code": "PERMISSION_DENIED", "message": f"no entry for {self.requestline} {said}"}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("user_in_uri", "environment", "expected"),
    [
        ("me:s3cret@", {}, "Basic " + base64.b64encode(b"me:s3cret").decode()),
        ("", {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "s3cret"}, "Basic bWU6czNjcmV0"),
        ("", {"MLFLOW_TRACKING_TOKEN": "s3cret"}, "Bearer s3cret"),
    ],
)
def test_credentials_reach_the_server_and_nobody_else(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    user_in_uri: str,
    environment: dict[str, str],
    expected: str,
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Doorkeeper)
    server.heard = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    driver = Driver(home, "a")
    tracker = driver.tracker(f"http://{user_in_uri}127.0.0.1:{server.server_port}")

    complaint = tracker.finish(driver.over(), patience_s=0.5)
    server.shutdown()

    assert set(server.heard) == {expected}  # type: ignore[attr-defined]
    assert complaint is not None
    assert "no entry" in complaint
    printed = capfd.readouterr()
    for text in (complaint, printed.out, printed.err, (home / "ledger.db").read_bytes().decode(errors="replace")):
        assert "s3cret" not in text
        assert "bWU6czNjcmV0" not in text


# -- a real server behind a proxy that misbehaves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[tuple[int, Path]]:
    """(port, directory with mlflow.db and files/) of an MLflow server that keeps the artifacts itself."""
    directory = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, directory / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--artifacts-destination", str(directory / "files")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((directory / "log").read_text()) from None
                time.sleep(0.2)
        yield port, directory
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture
def proxy(server: tuple[int, Path], home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Before the server; of what other tests left there nothing is seen. Requests are given up after two seconds."""
    with closing(sqlite3.connect(server[1] / "mlflow.db", timeout=20)) as db, db:
        db.execute("UPDATE tags SET value = 'of another test' WHERE key IN ('pare.sweep', 'pare.trial', 'pare.trial_uid')")
        db.execute("DELETE FROM metrics")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_S", 0.5)
    proxy = FaultyProxy(server[0])
    yield proxy
    proxy.close()


def address(proxy: FaultyProxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


def own_rows(directory: Path) -> list[tuple[str, str, int, float]]:
    return [row for row in metric_rows(directory) if row[0] in ("a", "b")]


def own_runs(directory: Path) -> dict[str, list[str]]:
    """As `runs`, of this test's sweep."""
    with closing(sqlite3.connect(directory / "mlflow.db")) as db:
        query = (
            "SELECT status, (SELECT value FROM tags WHERE run_uuid = r.run_uuid AND key = 'pare.trial') FROM runs r "
            "JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'pare.sweep' AND t.value = ? WHERE lifecycle_stage = 'active'"
        )
        found: dict[str, list[str]] = {}
        for status, trial in db.execute(query, (SWEEP,)):
            found.setdefault(trial or "", []).append(status)
        return found


DONE = {"": ["FINISHED"], "a": ["FINISHED"], "b": ["FINISHED"]}


def whole_sweep(driver: Driver, steps: int = 20, pause_s: float = 0.0) -> tuple[dict[str, Any], list[float]]:
    """Two trials over a shared training, from beginning to end. Returns the record and the losses."""
    losses = [3.0 / (1 + step) for step in range(steps)]
    driver.starts("a")
    driver.starts("b")
    for step, loss in enumerate(losses):
        driver.sees(step, loss, "a", "b")
        time.sleep(pause_s)
    driver.trained(losses)
    driver.ends("a", ppl=10.0)
    driver.ends("b", ppl=11.0)
    return driver.over(), losses


def emitted(record: dict[str, Any]) -> list[tuple[str, str, int, float]]:
    """The rows that MLflow must have for the trials of a record, no more and no fewer."""
    rows = []
    for trial in record["trials"]:
        rows += [(trial["trial"], name, 0, value) for name, value in trial["metrics"].items()]
        rows += [(trial["trial"], name, step, value) for name, points in trial["curves"].items() for step, value in points]
    return sorted(rows)


@pytest.mark.slow
def test_a_server_that_refuses_for_a_while_gets_every_row_once_and_slows_nothing(
    home: Path, proxy: FaultyProxy, server: tuple[int, Path]
) -> None:
    driver = Driver(home, "a", "b")
    proxy.set("refuse")
    tracker = driver.tracker(address(proxy))
    tracker.start()
    start = time.monotonic()
    record, losses = whole_sweep(driver, pause_s=0.05)
    took = time.monotonic() - start
    waiting, failing = driver.left(), tracker.problem
    proxy.set("pass")

    complaint = tracker.finish(record)

    assert took < 20 * 0.05 + 1.5
    assert waiting == 2 + 2 + 2 * len(losses) + 2
    assert failing is not None
    assert complaint is None
    assert driver.left() == 0
    assert own_rows(server[1]) == emitted(record)
    assert own_runs(server[1]) == DONE


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [b"runs/create ", b"runs/log-batch ", b"runs/update ", b"PUT /api/2.0/mlflow-artifacts"])
def test_a_reply_lost_after_the_server_has_written_makes_no_second_run_and_no_second_row(
    home: Path, proxy: FaultyProxy, server: tuple[int, Path], pattern: bytes
) -> None:
    driver = Driver(home, "a", "b")
    tracker = driver.tracker(address(proxy))
    proxy.set("lose", pattern=pattern)
    tracker.start()
    record, _ = whole_sweep(driver, pause_s=0.05)
    deadline = time.monotonic() + 15
    while proxy.lost < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    lost = proxy.lost
    proxy.set("pass")

    complaint = tracker.finish(record)

    assert lost >= 2
    assert complaint is None
    assert own_rows(server[1]) == emitted(record)
    assert own_runs(server[1]) == DONE


@pytest.mark.slow
def test_a_server_that_swallows_requests_does_not_slow_the_driver(
    home: Path, proxy: FaultyProxy, server: tuple[int, Path]
) -> None:
    driver = Driver(home, "a", "b")
    tracker = driver.tracker(address(proxy))
    proxy.set("blackhole")
    tracker.start()
    driver.starts("a")
    uid, took = trial_uid(SWEEP, "a"), []
    deadline = time.monotonic() + 20
    while tracker.problem is None and time.monotonic() < deadline:
        for step in range(20):
            start = time.perf_counter()
            driver.ledger.post(SWEEP, uid, "point", {"name": "train/loss", "step": step, "value": 1.0})
            took.append(time.perf_counter() - start)
        driver.ledger.commit()
        time.sleep(0.02)
    proxy.set("pass")
    complaint = tracker.finish(driver.over("interrupted"))

    assert len(took) > 200, "requests were given up too soon to say anything"
    assert statistics.median(took) < 1e-3
    assert sorted(took)[int(len(took) * 0.9)] < 1e-3
    assert complaint is None
    assert [row[1:3] for row in own_rows(server[1])] == [("train/loss", step) for step in range(20)]
    assert own_runs(server[1]) == {"": ["KILLED"], "a": ["KILLED"]}


@pytest.mark.slow
def test_a_server_that_breaks_for_ever_costs_a_bounded_wait_and_pare_sync_mends_it(
    home: Path, proxy: FaultyProxy, server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(home, "a", "b")
    tracker = driver.tracker(address(proxy))
    proxy.set("500")
    tracker.start()
    record, _ = whole_sweep(driver)
    start = time.monotonic()
    complaint = tracker.finish(record, patience_s=3)
    took = time.monotonic() - start
    driver.dies()
    with closing(sqlite3.connect(home / "ledger.db")) as db:
        kinds = {kind for (kind,) in db.execute("SELECT kind FROM outbox")}
        n_rows = db.execute("SELECT COUNT(*) FROM outbox").fetchone()[0]
    proxy.set("pass")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address(proxy))

    sent, left, problems = outbox.sync(home)

    assert took < 6
    assert proxy.refused >= 2
    assert complaint is not None
    assert complaint.startswith(f"tracking is behind: {n_rows} rows wait in the outbox.")
    assert "500" in complaint
    assert kinds == {"sweep", "trial", "point"}
    assert (sent, left, problems) == (n_rows, 0, [])
    assert own_rows(server[1]) == emitted(record)
    assert own_runs(server[1]) == DONE


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reset", "blackhole", "500"])
def test_a_server_that_is_well_and_ill_in_turn_ends_with_every_row_once(
    home: Path, proxy: FaultyProxy, server: tuple[int, Path], mode: str
) -> None:
    driver = Driver(home, "a", "b")
    tracker = driver.tracker(address(proxy))
    over = threading.Event()

    def weather() -> None:
        for n in range(100):
            proxy.set(mode if n % 2 else "pass")
            if over.wait(0.15 if n % 2 else 0.25):
                break
        proxy.set("pass")

    change = threading.Thread(target=weather)
    change.start()
    tracker.start()
    record, _ = whole_sweep(driver, pause_s=0.1)
    over.set()
    change.join()

    assert tracker.finish(record) is None
    assert own_rows(server[1]) == emitted(record)
    assert own_runs(server[1]) == DONE


@pytest.mark.slow
def test_a_file_whose_upload_was_cut_is_not_there_in_part_and_whole_later(
    home: Path, proxy: FaultyProxy, server: tuple[int, Path]
) -> None:
    driver = Driver(home, "a", "b")
    tracker = driver.tracker(address(proxy))
    directory = home / "sweeps" / SWEEP
    directory.mkdir(parents=True)
    page = os.urandom(3_000_000)
    (directory / "report.html").write_bytes(page)
    driver.ends("a")
    tracker.drain()
    tracker._record = driver.over()
    before = set((server[1] / "files").rglob("*"))
    proxy.set("cut", n_bytes=1_000_000)
    with pytest.raises(TrackingError):
        tracker.drain(ending=True)
    partial = [path for path in set((server[1] / "files").rglob("*")) - before if path.name == "report.html"]
    proxy.set("pass")

    tracker.drain(ending=True)

    assert partial == []
    (whole,) = [path for path in set((server[1] / "files").rglob("*")) - before if path.name == "report.html"]
    assert whole.read_bytes() == page


@pytest.mark.slow
def test_a_point_reaches_a_slow_server_within_ten_seconds_while_the_trial_runs(
    home: Path, proxy: FaultyProxy, server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "POLL_S", 1.0)
    driver = Driver(home, "a", "b")
    tracker = driver.tracker(address(proxy))
    proxy.set("pass", latency_s=0.1)
    tracker.start()
    driver.starts("a")
    time.sleep(2)
    start = time.monotonic()
    driver.sees(7, 1.5, "a")
    while not own_rows(server[1]) and time.monotonic() - start < 20:
        time.sleep(0.05)

    assert time.monotonic() - start < 10
    assert own_rows(server[1]) == [("a", "train/loss", 7, 1.5)]
    assert own_runs(server[1])["a"] == ["RUNNING"]
    assert tracker.finish(driver.over("interrupted")) is None


@pytest.mark.slow
def test_nothing_of_mlflow_comes_among_the_results_on_stdout(
    home: Path, proxy: FaultyProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    driver = Driver(home, "a", "b")
    tracker = driver.tracker(address(proxy).replace("//", "//me:s3cret@"))
    record, _ = whole_sweep(driver)

    assert tracker.finish(record) is None
    assert capfd.readouterr() == ("", "")
