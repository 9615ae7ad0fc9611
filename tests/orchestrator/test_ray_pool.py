"""The pool on real raylets: GPUs by number and by share (none is needed, Ray only counts them), labels, nodes that go."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as Raylets

from pare.orchestrator.engine import Engine, Limits, register
from pare.orchestrator.errors import InfeasibleError
from pare.orchestrator.fingerprint import digest
from pare.orchestrator.ledger import Ledger
from pare.orchestrator.plan import Goals, Plan, Task
from pare.orchestrator.pool import Reply, Room
from pare.orchestrator.ray_pool import RayPool
from pare.orchestrator.schema import Cluster
from pare.workers.store import Store
from tests.orchestrator.fakes import Silent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
TYPE = "tests.orchestrator.waiting"


def request(store: Store, name: str, seconds: float = 0.0) -> dict[str, Any]:
    return {
        "fingerprint": digest(name), "type": TYPE, "label": name, "spec": {"seconds": seconds, "name": name}, "where": {},
        "inputs": {}, "store": store.location, "device": "cpu", "threads": 1, "log": None,
    }  # fmt: skip


def replies(pool: RayPool, n: int) -> list[Reply]:
    found: list[Reply] = []
    deadline = time.monotonic() + 300
    while len(found) < n:
        assert time.monotonic() < deadline, found
        found += [reply for _, job in pool.wait(0.5) for reply in job]
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pool sets for Ray goes when the test ends. Whether there are tokens Ray decides when it is imported: here not."""
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    cluster = Raylets(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "labels": {"zone": "a"}})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_gpus_by_their_numbers_are_one_slot_each(tmp_path: Path, store: Store) -> None:
    pool = RayPool(None, "cuda", tmp_path, Cluster(gpus=[0, 3]))
    try:
        assert pool.slots == 2
        for job in range(2):
            pool.submit(job, [request(store, str(job), 0.5)], Room.SLOT)
        assert pool.idle() == 0
        assert {reply["result"]["gpu"] for reply in replies(pool, 2)} == {"0", "3"}
    finally:
        pool.close()


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvidia-smi` says that there are four GPUs of 80 GB."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 1 2 3 4; do echo 80000; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("four_gpus")
def test_tasks_share_a_gpu_by_the_memory_that_they_declare(tmp_path: Path, store: Store) -> None:
    pool = RayPool(None, "cuda", tmp_path, Cluster(gpus=[1, 2], gpu_memory_gb=40))
    try:
        assert (pool.per_gpu, pool.slots) == (2, 4)
        for job in range(4):
            pool.submit(job, [request(store, str(job), 0.5)], Room.SLOT)
        assert pool.idle() == 0
        assert sorted(reply["result"]["gpu"] for reply in replies(pool, 4)) == ["1", "1", "2", "2"]
        pool.submit(4, [request(store, "whole")], Room.DEVICE)  # what ran out of memory is tried again with a GPU to itself
        assert pool.idle() == 2
        assert replies(pool, 1)[0]["ok"]
    finally:
        pool.close()


@pytest.mark.usefixtures("four_gpus")
def test_a_share_larger_than_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"the smallest GPU has 83.9 GB"):
        RayPool(None, "cuda", tmp_path, Cluster(gpus=[0], gpu_memory_gb=100))


def test_only_nodes_with_the_labels_are_used(tmp_path: Path, store: Store, raylets: Raylets) -> None:
    raylets.add_node(num_cpus=2, labels={"zone": "b"})
    pool = RayPool(None, "cpu", tmp_path, Cluster(address=raylets.address, labels={"zone": "b"}))
    try:
        assert pool.slots == 2
        for job in range(2):
            pool.submit(job, [request(store, str(job))], Room.SLOT)
        assert all(reply["ok"] for reply in replies(pool, 2))
        assert {node["Labels"]["zone"] for node in pool._nodes() if node["NodeID"] in pool._node.values()} == {"b"}
    finally:
        pool.close()
    with pytest.raises(InfeasibleError, match=r"no node with the labels {'zone': 'c'} that offers a core"):
        RayPool(None, "cpu", tmp_path, Cluster(address=raylets.address, labels={"zone": "c"}))


def test_ranks_on_two_nodes_find_each_other(tmp_path: Path, store: Store, raylets: Raylets) -> None:
    raylets.add_node(num_cpus=1)
    pool = RayPool(None, "cpu", tmp_path, Cluster(address=raylets.address))
    spec = {"settings": {"steps": 2, "batch_size": 2}, "told": str(tmp_path)}
    try:
        assert pool.ranks() == 2
        pool.submit(0, [{**request(store, "both"), "type": "tests.orchestrator.ranked", "spec": spec, "ranks": 2}], Room.SLOT)
        (reply,) = replies(pool, 1)
    finally:
        pool.close()

    assert reply["ok"], reply
    assert len(set(reply["result"]["nodes"])) == reply["result"]["ranks"] == 2


def test_a_cluster_that_does_not_answer_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"no Ray cluster answers at cluster.address=127.0.0.1:9"):
        RayPool(None, "cpu", tmp_path, Cluster(address="127.0.0.1:9"))


def test_a_sweep_that_loses_a_node_of_fake_gpus_in_the_middle_ends_with_every_result(
    tmp_path: Path, store: Store, raylets: Raylets
) -> None:
    nodes = [raylets.add_node(num_cpus=2, num_gpus=2) for _ in range(2)]
    plan = Plan()
    for i in range(24):
        record = request(store, str(i), 0.3)
        task = Task(record["fingerprint"], TYPE, str(i), record["spec"], {}, {}, {"type": TYPE}, [str(i)])
        plan.tasks[task.fingerprint] = task
        plan.goals[str(i)] = Goals(*[task.fingerprint] * 4, None, [task.fingerprint])
    ledger = Ledger(tmp_path, write=True)
    register(plan, store, ledger)
    run = ledger.start_run("s", "s", "pare run", {}, 24, 24, 0)
    pool = RayPool(None, "cuda", tmp_path, Cluster(address=raylets.address, device="cuda"))
    assert pool.slots == 4

    class Removing(Silent):
        def ended(self, task: Task, reply: Reply, final: bool) -> None:
            if len(list(store.artifacts())) >= 8 and len(nodes) == 2:
                raylets.remove_node(nodes.pop(), allow_graceful=False)

    listener = Removing()
    try:
        Engine(plan, store, ledger, run, "s", pool, tmp_path, "cpu", Limits()).execute(listener)
        deadline = time.monotonic() + 60
        while pool.slots != 2:  # Ray takes some time to notice
            assert time.monotonic() < deadline
            pool.wait(0.1)
    finally:
        pool.close()

    assert set(listener.trials.values()) == {"done"}
    assert len(listener.trials) == 24
    states = [row["status"] for row in ledger.rows("SELECT status FROM attempt")]
    assert states.count("done") == 24
    assert states.count("failed") >= 1


def test_a_job_that_waits_in_line_takes_no_slot_and_outlives_the_worker_that_it_waited_for(
    tmp_path: Path, store: Store
) -> None:
    pool = RayPool(1, "cpu", tmp_path, Cluster())
    try:
        pool.submit(0, [request(store, "long", 300)], Room.SLOT)
        pool.submit(1, [request(store, "short")], Room.SLOT, behind=0)
        assert pool.idle() == 0
        pool.kill(0, "hang", "as told")
        first, second = replies(pool, 2)
        assert (first["failure"], second["ok"]) == ("hang", True)
        assert pool.idle() == 1

        pool.submit(2, [request(store, "one", 0.3)], Room.SLOT)
        pool.submit(3, [request(store, "other")], Room.SLOT, behind=2)
        found = replies(pool, 2)
        assert [reply["ok"] for reply in found] == [True, True]
        assert len({reply["result"]["pid"] for reply in found}) == 1
    finally:
        pool.close()
