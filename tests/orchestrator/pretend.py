"""A whole driver with a worker that only pretends: every task is a few bytes and some numbers, drawn from its fingerprint."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pare.methods.contract import load_all
from pare.orchestrator import config, drive, engine, segments
from pare.orchestrator.config import Experiment
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.plan import Plan, build_plan
from pare.orchestrator.pool import InlinePool
from pare.tracking import report
from pare.workers.run import classify
from pare.workers.store import Store, open_store

QUIET = ("tracking.enabled=false", "evaluation.speed.repeats=0")


def run(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In place of the worker's `run_batch`."""
    return [one(request) for request in requests]


def one(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return made(request, open_store(request["store"]))
    except Exception as e:  # as the worker does
        return {"ok": False, **classify(e), "cost": {}}


def made(request: dict[str, Any], store: Store) -> dict[str, Any]:
    for fingerprint in request["inputs"].values():
        store.open(fingerprint)
    result = result_of(request["type"], random.Random(request["fingerprint"]))
    with store.attempt() as out:
        (out / "value.json").write_text(json.dumps(result))
        if request["type"] == "evaluate":
            windows = {"nll": [1.0, result["quality/ppl"]], "tokens": [8, 8]}
            (out / "evaluation.json").write_text(json.dumps({"result": result, "windows": windows}))
        cost = {"wall_s": 1.0, "cpu_s": 1.0, "memory_start_bytes": 1.0, "peak_rss_bytes": 1.0, "disk_bytes": 1.0}
        manifest, published = store.publish(out, request["fingerprint"], request["type"], result, cost)
    return {"ok": True, "digest": manifest["digest"], "result": manifest["result"], "cost": cost, "published": published}


def result_of(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind == "export":
        return {"opens_with": "transformers", "size/bytes": rng.randrange(10**6)}
    if kind in ("score", "evaluate"):
        return {"quality/ppl": 10 + rng.random(), "quality/kl": rng.random()}
    return {}


@contextlib.contextmanager
def pretending(slow_s: float = 0.0) -> Iterator[None]:
    """Drivers in this process pretend. Searches are tasks like others then: nothing asks and nothing probes."""

    def slow(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        time.sleep(slow_s)
        return run(requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "COORDINATED", frozenset())
        patch.setattr(engine, "ELSEWHERE_EVERY_S", 0.05)
        patch.setattr(segments, "EVERY_S", 0.0)
        patch.setattr(report.plots, "draw", lambda record: {})  # pictures take seconds
        patch.setattr(drive, "RayPool", lambda *_: InlinePool(slow))
        yield


def sweep(home: Path, overrides: Sequence[str], slow_s: float = 0.0) -> int:
    """One driver's life over an experiment."""
    experiment, plan = prepared(tuple(overrides))
    with pretending(slow_s):
        return drive.run(experiment, plan, "cpu", home, "pare run")


@functools.cache
def prepared(overrides: tuple[str, ...]) -> tuple[Experiment, Plan]:
    """Worked out once for all forked drivers. A driver changes its plan: in this process there may be one."""
    load_all()
    experiment = config.load([*overrides, *QUIET])
    return experiment, build_plan(experiment, "cpu", 2)


def table(home: Path) -> bytes:
    """What a sweep came to, as it stands in its report."""
    (report,) = home.glob("sweeps/*/report.json")
    return json.dumps(json.loads(report.read_text())["trials"], sort_keys=True).encode()


def attempts(home: Path) -> list[tuple[str, str]]:
    """(task, how it ended) of every attempt in a ledger."""
    ledger = Ledger(home)
    query = "SELECT task.label, attempt.status FROM attempt JOIN task USING (fingerprint) ORDER BY attempt.id"
    found = [(row["label"], row["status"]) for row in ledger.rows(query)]
    ledger.close()
    return found


Driver = tuple[int, int]
"""A forked driver: its process, and a pipe through which it tells how often it touched a file."""


def start(home: Path, overrides: Sequence[str], die_at: int | None = None, slow_s: float = 0.0) -> Driver:
    """Forks a driver, which is killed when it touches a file of `home` or of its store for the `die_at`-th time."""
    prepared(tuple(overrides))
    told, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        return pid, told
    touched = 0
    places = [str(home), *(word.removeprefix("store.url=") for word in overrides if word.startswith("store.url="))]

    def touch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in WATCHED and any(place in str(argument) for argument in arguments for place in places):
            touched += 1
            if touched == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 70
    try:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - this process ends by os._exit
        ledger_counts(touch, home)
        sys.addaudithook(touch)
        code = sweep(home, overrides, slow_s)
    finally:
        os.write(tell, str(touched).encode())
        os._exit(code)


def join(driver: Driver) -> tuple[int, int]:
    """(exit code, negative for a signal; how often it touched a file)."""
    pid, told = driver
    _, status = os.waitpid(pid, 0)
    with os.fdopen(told) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(status), int(said or 0)


WATCHED = frozenset({"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "ledger"})


def ledger_counts(touch: Any, home: Path) -> None:
    """Makes every statement of the ledger a place to die at; SQLite's own file operations raise no audit events."""
    for name in ("write", "commit"):
        original = getattr(Ledger, name)

        def counted(self: Ledger, *arguments: Any, original: Any = original) -> Any:
            touch("ledger", (home,))
            return original(self, *arguments)

        setattr(Ledger, name, counted)
