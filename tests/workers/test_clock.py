"""What an attempt cost: its own peak of memory, not that of the process's past."""

import sys
from pathlib import Path

import pytest

from pare.workers.fresh import FreshProcess
from pare.workers.run import Clock, bytes_of, release_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="the mark is set back through /proc")
MB = 1 << 20


@pytest.fixture(autouse=True)
def settled() -> None:
    """Garbage of other tests that goes while a clock runs would be taken off what it measures."""
    release_memory()


@linux
def test_a_small_task_after_a_large_one_has_a_small_peak() -> None:
    first = Clock()
    ballast = bytearray(300 * MB)
    large = first.cost()
    del ballast

    small = Clock().cost()

    assert large["peak_rss_bytes"] - large["memory_start_bytes"] > 290 * MB
    assert small["peak_rss_bytes"] - small["memory_start_bytes"] < 50 * MB


@linux
def test_the_memory_of_a_fresh_process_counts() -> None:
    clock = Clock()
    with FreshProcess(bytearray, threads=1, source=400 * MB) as process:
        process.ask("isalpha")

    cost = clock.cost()

    assert cost["peak_rss_bytes"] - cost["memory_start_bytes"] > 400 * MB
    assert Clock().cost()["peak_rss_bytes"] < cost["peak_rss_bytes"] - 300 * MB


def test_a_linked_file_costs_no_bytes_a_second_time(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "base" / "weights").write_bytes(b"x" * 1000)
    (tmp_path / "own" / "weights").hardlink_to(tmp_path / "base" / "weights")
    (tmp_path / "own" / "adapter").write_bytes(b"x" * 10)

    assert bytes_of(tmp_path / "own") == 10


@linux
def test_only_a_task_that_has_held_much_has_its_process_searched_for_what_it_left() -> None:
    little = Clock()
    little.cost()
    much = Clock()
    ballast = bytearray(64 * MB)
    much.cost()
    del ballast

    assert not little.has_held_much()
    assert much.has_held_much()
    assert Clock().has_held_much()  # nobody knows yet
