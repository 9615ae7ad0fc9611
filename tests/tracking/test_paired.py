"""The paired bootstrap: sees a small steady difference, and calls chance chance."""

import math
import random

import pytest

from pare.tracking.paired import compare


def trial(nll: list[float], tokens: float = 100.0) -> dict:
    return {"windows": {"nll": nll, "tokens": [tokens] * len(nll)}}


def test_a_steady_difference_is_seen_though_windows_differ_widely() -> None:
    base = [100.0, 300.0, 150.0, 400.0, 220.0, 310.0, 90.0, 260.0]

    found = compare(trial([x + 2 for x in base]), trial(base))

    assert found is not None
    assert found.change == pytest.approx(math.exp(0.02) - 1)
    assert found.low == pytest.approx(found.high)
    assert found.beyond_noise


def test_a_difference_that_changes_sign_from_window_to_window_is_noise() -> None:
    chance = random.Random(1)
    base = [chance.uniform(100, 300) for _ in range(40)]

    found = compare(trial([x + (20 if i % 2 else -20) for i, x in enumerate(base)]), trial(base))

    assert found is not None
    assert found.low < 0 < found.high
    assert not found.beyond_noise


def test_a_trial_equals_itself() -> None:
    found = compare(trial([1.0, 2.0, 3.0]), trial([1.0, 2.0, 3.0]))

    assert found is not None
    assert (found.change, found.low, found.high) == (0, 0, 0)
    assert not found.beyond_noise


def test_unlike_windows_are_not_compared() -> None:
    assert compare(trial([1.0, 2.0]), trial([1.0, 2.0, 3.0])) is None
    assert compare(trial([1.0, 2.0]), trial([1.0, 2.0], tokens=50.0)) is None
    assert compare({}, trial([1.0, 2.0])) is None


def test_the_interval_covers_the_true_change_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        chance = random.Random(seed)
        base = [chance.gauss(200, 40) for _ in range(30)]
        found = compare(trial([x + 5 + chance.gauss(0, 10) for x in base]), trial(base))
        assert found is not None
        covered += found.low <= math.exp(0.05) - 1 <= found.high

    assert 85 <= covered <= 100
