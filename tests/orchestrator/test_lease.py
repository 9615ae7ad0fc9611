"""Leases between drivers: one at a task, the dead make room, clocks are each looker's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pare.orchestrator.lease import TTL_S, Leases, born
from pare.workers.blobs import LocalBlobs


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path)


def elsewhere(blobs: LocalBlobs, fingerprint: str) -> None:
    """Makes a lease one of another machine."""
    key = f"leases/{fingerprint}"
    blobs.write(key, json.dumps({**json.loads(blobs.read(key)), "host": "another"}).encode())


def test_one_driver_has_a_task_until_it_gives_it_back(blobs: LocalBlobs) -> None:
    a, b = Leases(blobs, "a"), Leases(blobs, "b")

    assert (a.take("x"), b.take("x"), a.take("x"), b.take("y")) == (True, False, True, True)
    holder = b.holder("x")
    assert holder is not None
    assert (holder["driver"], holder["pid"]) == ("a", os.getpid())
    a.release("x")
    assert b.take("x")


def test_a_driver_that_closes_gives_everything_back_and_nothing_of_others(blobs: LocalBlobs) -> None:
    a, b = Leases(blobs, "a"), Leases(blobs, "b")
    a.take("x")
    b.take("y")
    a.release("y")

    a.close()

    assert blobs.list("leases") == ["leases/y"]
    assert blobs.list("drivers") == ["drivers/b"]


def test_a_driver_takes_back_what_it_had_in_an_earlier_life(blobs: LocalBlobs) -> None:
    Leases(blobs, "a").take("x")

    assert Leases(blobs, "a").take("x")


def test_a_driver_whose_process_here_is_gone_is_dead_at_once(blobs: LocalBlobs) -> None:
    took = "from pare.orchestrator.lease import Leases; from pare.workers.blobs import LocalBlobs; from pathlib import Path"
    subprocess.run([sys.executable, "-c", f"{took}; Leases(LocalBlobs(Path({str(blobs.root)!r})), 'a').take('x')"], check=True)

    assert Leases(blobs, "b").take("x")


def test_a_driver_elsewhere_is_dead_when_its_beat_stands_still_by_the_clock_of_the_looker(blobs: LocalBlobs) -> None:
    hers, mine = Clock(), Clock()
    a, b = Leases(blobs, "a", hers), Leases(blobs, "b", mine)
    a.take("x")
    elsewhere(blobs, "x")

    for _ in range(5):  # it beats: alive, however much time goes by
        mine.now += TTL_S / 2
        hers.now += TTL_S / 2
        a.beat()
        assert not b.take("x")
    mine.now += TTL_S - 1
    assert not b.take("x")
    mine.now += 2
    assert b.take("x")


def test_a_driver_elsewhere_that_left_no_beat_is_waited_for_as_long(blobs: LocalBlobs) -> None:
    clock = Clock()
    Leases(blobs, "a").take("x")
    elsewhere(blobs, "x")
    blobs.delete("drivers/a")
    b = Leases(blobs, "b", clock)

    assert not b.take("x")
    clock.now += TTL_S + 1
    assert b.take("x")


def test_a_process_number_that_is_used_again_is_another_process() -> None:
    assert born(os.getpid()) == born(os.getpid()) is not None
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert born(process.pid) is None
