"""What counts as loading, so that the rest is the work."""

import time

import pytest

from pare.workers import loading


def test_what_loads_while_it_loads_counts_once_and_what_fails_counts_too() -> None:
    @loading.is_loading
    def inner() -> str:
        time.sleep(0.02)
        return "loaded"

    before = loading.seconds
    start = time.perf_counter()
    with loading.loading():
        assert inner() == "loaded"
    assert 0.02 <= loading.seconds - before <= time.perf_counter() - start

    @loading.is_loading
    def fails() -> None:
        time.sleep(0.01)
        raise ValueError("no such file")

    before = loading.seconds
    with pytest.raises(ValueError, match="no such file"):
        fails()
    assert loading.seconds - before >= 0.01
