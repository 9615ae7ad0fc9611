"""The front: what dominates what, ties, and which figures may not compete."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pare.tracking.pareto import SIZE_AND_PERPLEXITY, front, mark_front
from tests.tracking import records


def points(*pairs: tuple[float | None, float | None], **changes: Any) -> dict[str, Any]:
    """A record of trials with these (bytes, perplexity), named by their place."""
    trials = []
    for i, (size, ppl) in enumerate(pairs):
        metrics = {"size/bytes": size, "quality/ppl": ppl}
        one = records.trial("rtn", "rtn", {"i": i}, 20.0, 1e8)
        trials.append({**one, "trial": str(i), "metrics": metrics, "notes": [], **changes})
    return records.record(trials)


def names(trials: list[dict[str, Any]]) -> list[str]:
    return [t["trial"] for t in trials]


def test_a_trial_beaten_on_both_axes_is_off_the_front_and_the_rest_is_ordered_by_size() -> None:
    record = points((300, 10.0), (100, 30.0), (200, 20.0), (250, 25.0))

    assert names(front(record)) == ["1", "2", "0"]


def test_being_equal_on_one_axis_and_worse_on_the_other_is_beaten() -> None:
    record = points((100, 20.0), (100, 21.0), (120, 20.0))

    assert names(front(record)) == ["0"]


def test_trials_equal_on_both_axes_are_both_on_the_front() -> None:
    record = points((100, 20.0), (200, 10.0), (100, 20.0))

    assert sorted(names(front(record))) == ["0", "1", "2"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_was_not_measured_or_is_no_number_is_never_on_the_front(bad: float | None) -> None:
    record = points((100, bad), (bad, 1.0), (200, 20.0))

    assert names(front(record)) == ["2"]


def test_a_missing_metric_is_like_one_that_is_null() -> None:
    record = points((100, 10.0), (200, 20.0))
    del record["trials"][0]["metrics"]["quality/ppl"]

    assert names(front(record)) == ["1"]


def test_only_finished_trials_compete() -> None:
    record = points((100, 10.0), (200, 20.0))
    record["trials"][0]["status"] = "failed"

    assert names(front(record)) == ["1"]


def test_an_objective_may_be_maximised() -> None:
    record = points((100, 10.0), (200, 20.0))

    assert names(front(record, [("quality/ppl", "max")])) == ["1"]


def test_a_direction_that_is_neither_min_nor_max_is_refused() -> None:
    with pytest.raises(ValueError, match="objective 'size/bytes' must be 'min' or 'max', got 'down'"):
        front(points((1, 1.0)), [("size/bytes", "down")])


def test_speed_that_is_no_deployment_figure_stays_off_a_front_of_speeds_but_not_off_one_of_sizes() -> None:
    record = points((100, 30.0), (200, 20.0))
    for trial, speed in zip(record["trials"], (50.0, 10.0), strict=True):
        trial["metrics"]["speed/transformers/decode_tok_s"] = speed
    record["trials"][0]["notes"] = ["decompressed by transformers, no deployment figure"]
    by_speed = [("quality/ppl", "min"), ("speed/transformers/decode_tok_s", "max")]

    assert names(front(record, by_speed)) == ["1"]
    assert names(front(record)) == ["0", "1"]


def test_speeds_of_unlike_runtimes_do_not_meet() -> None:
    record = points((100, 30.0), (200, 20.0))
    record["trials"][0]["metrics"]["speed/transformers/decode_tok_s"] = 50.0
    record["trials"][1]["metrics"]["speed/llama.cpp/decode_tok_s"] = 10.0

    assert names(front(record, [("speed/transformers/decode_tok_s", "max")])) == ["0"]


def test_marking_sets_the_flag_of_every_trial_and_takes_back_old_ones() -> None:
    record = points((100, 10.0), (200, 20.0), (300, 5.0))
    record["trials"][1]["pareto"] = True

    members = mark_front(record)

    assert [t["pareto"] for t in record["trials"]] == [True, False, True]
    assert names(members) == ["0", "2"]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=25))
def test_the_front_is_what_comparing_every_pair_gives(pairs: list[tuple[int, int]]) -> None:
    trials = [
        {"trial": str(i), "status": "done", "notes": [], "metrics": {"size/bytes": float(x), "quality/ppl": float(y)}}
        for i, (x, y) in enumerate(pairs)
    ]
    beaten = {
        i for i, (x, y) in enumerate(pairs) for other, (a, b) in enumerate(pairs) if a <= x and b <= y and (a, b) != (x, y)
    }

    found = {int(t["trial"]) for t in front({"trials": trials}, SIZE_AND_PERPLEXITY)}

    assert found == set(range(len(pairs))) - beaten
