"""Where slot time went: every second of it once."""

import pytest

from benchmarks.slots import WHERE, Attempt, account


def done(kind: str, started: float, finished: float, **cost: float) -> Attempt:
    return Attempt(kind, started, finished, True, cost)


def test_every_slot_second_is_counted_once() -> None:
    attempts = [
        done("import_model", 2.0, 6.0, wall_s=3.0, load_s=1.0),
        done("compress", 6.0, 10.0, wall_s=4.0),
        Attempt("compress", 6.0, 8.0, False, {"wall_s": 2.0}),
        done("score", 12.0, 15.0, wall_s=3.0),
    ]

    spent = account(0.0, 20.0, 2, attempts)

    assert spent == {
        "work": 2.0 + 4.0 + 3.0,
        "load": 1.0,
        "hand_over": 1.0,
        "failed": 2.0,
        "before": 2 * 2.0,
        "waiting": 4.0 + 2.0 + 4.0,
        "tail": 3.0 + 2 * 5.0,
    }
    assert sum(spent.values()) == 2 * 20.0


def test_tasks_that_are_timed_together_take_all_slots_once() -> None:
    together = [done("speed", 0.0, 10.0, wall_s=4.0), done("speed", 0.01, 10.0, wall_s=4.0)]

    spent = account(0.0, 10.0, 4, together)

    assert spent["work"] == 4 * 8.0
    assert spent["hand_over"] == pytest.approx(4 * 2.0)
    assert sum(spent.values()) == pytest.approx(4 * 10.0)


def test_a_search_counts_by_what_its_probes_held() -> None:
    beside = [done("allocate", 0.0, 10.0, wall_s=10.0, slot_s=15.0), done("score", 10.0, 11.0, wall_s=1.0)]

    spent = account(0.0, 11.0, 2, beside)

    assert spent["work"] == 16.0
    assert sum(spent[name] for name in WHERE) == pytest.approx(22.0)


def test_a_run_in_which_nothing_ran_was_idle() -> None:
    assert account(5.0, 6.0, 3, [])["before"] == 3.0
