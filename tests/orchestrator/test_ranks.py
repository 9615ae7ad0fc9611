"""Tasks of several ranks on real Ray: what they learn, how they end, and what becomes of them when one is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator.fingerprint import digest
from pare.orchestrator.pool import Reply, Room
from pare.orchestrator.ray_pool import RayPool
from pare.orchestrator.schema import Cluster
from pare.workers.run import run_task
from pare.workers.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SETTINGS = {"steps": 8, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    """Two slots; what a pool sets for Ray is taken back."""
    kept = dict(os.environ)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    pool = RayPool(2, "cpu", tmp_path_factory.mktemp("home"), Cluster(pending_s=100))
    yield pool
    pool.close()
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def request(store: Store, told: Path, ranks: int = 2, **spec: Any) -> dict[str, Any]:
    spec = {"settings": SETTINGS, "told": str(told), **spec}
    return {
        "fingerprint": digest([spec, ranks]), "type": "tests.orchestrator.ranked", "label": "ranked", "spec": spec, "where": {},
        "inputs": {}, "store": store.location, "device": "cpu", "threads": 1, "log": str(told / "log"), "ranks": ranks,
    }  # fmt: skip


def reply(pool: RayPool, timeout_s: float = 150.0) -> Reply:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for _, replies in pool.wait(0.5):
            return replies[0]
    raise TimeoutError


def until(path: Path) -> str:
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_ranks_learn_what_one_does_and_cost_what_both_spent(pool: RayPool, store: Store, tmp_path: Path, zero: int) -> None:
    alone = run_task(request(store, tmp_path, ranks=1, dropout=0.0))["result"]

    pool.submit(0, [request(store, tmp_path, dropout=0.0, zero=zero)], Room.SLOT)
    assert pool.idle() == 0
    assert pool.ranks() == 0
    both = reply(pool)

    assert both["ok"], both
    assert both["result"]["ranks"] == 2
    assert both["result"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert both["result"]["weights"] == pytest.approx(alone["weights"], rel=1e-3)
    assert store.manifest(both["fingerprint"])["result"] == both["result"]
    assert both["cost"]["peak_rss_bytes"] > 1.5 * both["cost"]["memory_start_bytes"] / 2
    assert pool.idle() == pool.ranks() == 2


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_after_a_rank_was_killed_the_next_attempt_goes_on_from_the_checkpoint_to_the_same_bits(
    pool: RayPool, store: Store, tmp_path: Path, zero: int
) -> None:
    pool.submit(0, [request(store, tmp_path, save_every_s=0, zero=zero)], Room.SLOT)
    undisturbed = reply(pool)["result"]
    assert undisturbed["taken"] == list(range(1, 9))

    disturbed = request(store, tmp_path, save_every_s=0, zero=zero, at=5, wait=300)
    pool.submit(1, [disturbed], Room.SLOT)
    until(tmp_path / "0.pid")
    os.kill(int(until(tmp_path / "1.pid")), signal.SIGKILL)
    lost = reply(pool)
    (tmp_path / "waited").touch()
    pool.submit(2, [disturbed], Room.SLOT)
    resumed = reply(pool)["result"]

    assert (lost["ok"], lost["failure"]) == (False, "lost_worker")
    assert lost["message"].startswith("rank 1: ")
    assert 1 < resumed["taken"][0] <= 5, "what was saved is not done again, and step 5 had not been saved"
    assert resumed["taken"] == list(range(resumed["taken"][0], 9))
    assert resumed["losses"] == undisturbed["losses"]
    assert resumed["weights"] == undisturbed["weights"]


def test_what_ended_one_rank_is_what_the_attempt_failed_of(pool: RayPool, store: Store, tmp_path: Path) -> None:
    pool.submit(0, [request(store, tmp_path, at=2, fail="nonfinite")], Room.SLOT)
    failed = reply(pool)

    assert (failed["ok"], failed["failure"], failed["message"]) == (False, "nonfinite", "as told")
    pool.submit(1, [request(store, tmp_path)], Room.SLOT)
    assert reply(pool)["ok"], "the pool is as good as before"


def test_the_first_rank_shows_its_curve_and_stops_when_it_is_told(pool: RayPool, store: Store, tmp_path: Path) -> None:
    told = request(store, tmp_path, at=3, wait=3)
    pool.submit(0, [told], Room.SLOT)
    points, progress, deadline = 0, {}, time.monotonic() + 100
    while points < 3:
        assert time.monotonic() < deadline, progress
        live = pool.look({0: (told["fingerprint"], points)}).get(0, {"points": [], "progress": None})
        points, progress = points + len(live["points"]), live["progress"] or progress
        time.sleep(0.1)
    pool.ask_to_stop()
    stopped = reply(pool)
    (tmp_path / "waited").touch()
    pool.submit(1, [told], Room.SLOT)
    resumed = reply(pool)

    assert progress["unit"] == "steps"
    assert (stopped["ok"], stopped["failure"]) == (False, "stopped")
    assert resumed["ok"]
    assert resumed["result"]["taken"][0] > 3


def test_a_killed_job_takes_its_ranks_with_it(pool: RayPool, store: Store, tmp_path: Path) -> None:
    pool.submit(0, [request(store, tmp_path, at=1, wait=300)], Room.SLOT)
    ranks = [int(until(tmp_path / f"{n}.pid")) for n in range(2)]
    pool.kill(0, "hang", "as told")
    assert reply(pool)["failure"] == "hang"

    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ranks_for_which_there_is_no_room_are_given_up_after_a_while(pool: RayPool, store: Store, tmp_path: Path) -> None:
    pool._pending_s = 5
    try:
        pool.submit(0, [request(store, tmp_path, ranks=3)], Room.SLOT)
        given_up = reply(pool)
    finally:
        pool._pending_s = 100

    assert (given_up["ok"], given_up["failure"]) == (False, "pending")
