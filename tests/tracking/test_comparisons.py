"""Trials against the base and the best: the draws against a slow bootstrap and the normal case, and the words of the report."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest

from pare.tracking import comparisons, reading, report
from pare.tracking.paired import DRAWS, compare
from pare.tracking.pareto import front, mark_front, objective
from pare.tracking.record import direction
from tests.tracking import records

ACC = "quality/acc/mine"


def slow(pairs: list[tuple[float, float, float]], change: Any, draws: int = 20_000) -> tuple[float, float]:
    """The interval by drawing pairs one at a time, with another generator."""
    chance = random.Random(5)
    drawn = sorted(change([pairs[chance.randrange(len(pairs))] for _ in pairs]) for _ in range(draws))
    return drawn[round(0.025 * draws)], drawn[round(0.975 * draws)]


def windows(seed: int, n: int, shift: float = 0.0) -> dict[str, Any]:
    base, own = random.Random(1), random.Random(seed)
    nll = [base.gauss(200, 40) + shift + own.gauss(0, 8) for _ in range(n)]
    return {"windows": {"nll": nll, "tokens": [50.0 + 10 * (i % 3) for i in range(n)]}}


def answered(text: str) -> dict[str, Any]:
    return {"answers": {ACC: text}}


def test_the_interval_of_perplexity_is_that_of_a_slow_bootstrap() -> None:
    a, b = windows(2, 12, shift=3), windows(3, 12)
    tokens = [20.0 if i % 3 else 900.0 for i in range(12)]  # of such unequal windows both sums vary
    for trial in (a, b):
        trial["windows"] |= {"tokens": tokens}
    a["windows"]["nll"] = [x + n / 20 for x, n in zip(a["windows"]["nll"], tokens, strict=True)]
    pairs = list(zip(a["windows"]["nll"], b["windows"]["nll"], a["windows"]["tokens"], strict=True))
    low, high = slow(pairs, lambda d: math.expm1(sum(x - y for x, y, _ in d) / sum(n for *_, n in d)))

    found = compare(a, b)

    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_the_interval_of_answers_is_that_of_a_slow_bootstrap() -> None:
    chance = random.Random(9)
    a = "".join(chance.choice("1110") for _ in range(60))
    b = "".join(x if chance.random() < 0.7 else chance.choice("015") for x in a)
    worth = {"0": 0.0, "1": 1.0, "5": 0.5}
    pairs = [(worth[x], worth[y], 1.0) for x, y in zip(a, b, strict=True)]
    low, high = slow(pairs, lambda d: sum(x - y for x, y, _ in d) / len(d))

    found = compare(answered(a), answered(b), ACC)

    assert found is not None
    assert found.change == pytest.approx(statistics.fmean(x - y for x, y, _ in pairs))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_where_differences_are_normal_the_interval_is_that_of_the_formula() -> None:
    a, b = windows(2, 400, shift=0.2), windows(3, 400)
    a["windows"]["tokens"] = b["windows"]["tokens"] = [100.0] * 400
    apart = [x - y for x, y in zip(a["windows"]["nll"], b["windows"]["nll"], strict=True)]
    mean, error = statistics.fmean(apart) / 100, statistics.stdev(apart) / 100 / math.sqrt(400)

    found = compare(a, b)

    assert found is not None
    assert found.change == pytest.approx(math.expm1(mean))
    expected = (math.expm1(mean - 1.96 * error), math.expm1(mean + 1.96 * error))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.1 * 2 * 1.96 * error)


def test_the_same_trials_give_the_same_interval_and_the_other_way_round_its_opposite() -> None:
    a, b = answered("1101" * 20), answered("1011" * 20)

    one, again, other = compare(a, b, ACC), compare(a, b, ACC), compare(b, a, ACC)

    assert one == again
    assert one is not None
    assert other is not None
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.03)
    assert DRAWS >= 1000


def test_a_few_answers_more_are_not_distinguishable_and_many_are() -> None:
    base = answered("10" * 100)

    few, many = compare(answered("11" * 2 + "10" * 98), base, ACC), compare(answered("11" * 60 + "10" * 40), base, ACC)

    assert few is not None
    assert many is not None
    assert not compare(answered("11" + "00" + "10" * 98), base, ACC).beyond_noise  # type: ignore[union-attr]
    assert many.beyond_noise
    assert compare(answered("10" * 99), base, ACC) is None, "not the same questions"
    assert compare({}, base, ACC) is None


@pytest.fixture
def record() -> dict[str, Any]:
    """The demo with windows and answers; rtn at 4 bits is the base with noise, at 3 bits it is worse in all windows."""
    made = records.demo()
    for i, t in enumerate(made["trials"]):
        t |= windows(i + 2, 24, shift=0.0 if i < 2 else 60.0 * math.log(t["metrics"]["quality/ppl"] / records.BASE_PPL))
        t["answers"] = {ACC: ("10" * 50) if i < 2 else ("1" * 20 + "10" * 40)}
        t["directions"] = {ACC: "higher", "quality/rhyme": "lower"}
        t["metrics"] |= {ACC: t["answers"][ACC].count("1") / 100, "quality/rhyme": float(i), "eval/questions/mine": 100}
    mark_front(made)
    return made


def test_every_trial_is_compared_with_the_base_and_with_the_best(record: dict[str, Any]) -> None:
    found = comparisons.rows(record)
    ppl = {row.trial: row for row in found if row.metric == "ppl"}
    acc = [row for row in found if row.metric == "acc/mine"]

    assert len(ppl) == len(acc) == 8
    assert ppl["base"].base == "is the base"
    assert ppl["rtn bits=4"].base.endswith("not distinguishable")
    assert "not distinguishable" not in ppl["rtn bits=3"].base
    assert ppl[ppl["base"].winner].best == "is the best"
    assert acc[0].base == "is the base"
    assert acc[1].base == "±0.0 points (±0.0 points to ±0.0 points), not distinguishable"
    assert "+10.0 points" in acc[2].base
    assert "not distinguishable" not in acc[2].base


def test_the_report_shows_the_differences_and_marks_what_is_not_distinguishable(record: dict[str, Any]) -> None:
    page, text = report.html(record, {}), report.markdown(record)

    for made in (page, text):
        assert "Differences" in made
        assert "not distinguishable from the base" in made
        assert "paired bootstrap over the same windows or questions" in made
    (column,) = [c for c in report.columns(record) if c.title == "vs base"]
    cells = [column.cell(t) for t in record["trials"]]
    assert cells[1].endswith("≈")
    assert not cells[2].endswith("≈")


def test_a_record_without_windows_and_answers_claims_no_differences() -> None:
    assert comparisons.rows(records.demo()) == []
    assert "## Differences" not in report.markdown(records.demo())


def test_the_report_and_the_front_know_the_direction_of_a_users_metric(record: dict[str, Any]) -> None:
    (column,) = [c for c in report.columns(record) if c.title == "rhyme"]

    assert direction(record, "quality/rhyme") == "lower"
    assert (direction(record, ACC), direction(record, "quality/ppl"), direction(record, "size/bytes")) == (
        "higher",
        "lower",
        "lower",
    )
    assert report.best_trials(record, column) == [record["trials"][0]["trial"]]
    assert [t["metrics"]["quality/rhyme"] for t in front(record, [objective(record, "quality/rhyme")])] == [0.0]
    best = front(record, [objective(record, ACC)])
    assert {t["metrics"][ACC] for t in best} == {max(t["metrics"][ACC] for t in record["trials"])}


def test_of_very_many_tasks_those_with_most_questions_have_a_column(record: dict[str, Any]) -> None:
    for t in record["trials"]:
        t["metrics"] |= {f"quality/acc/part{i}": 0.5 for i in range(30)} | {f"eval/questions/part{i}": i for i in range(30)}
        t["metrics"] |= {"quality/acc/pairs.group": 0.5}

    titles = [c.title for c in report.columns(record)]

    assert "acc mine" in titles
    assert [f"acc part{i}" in titles for i in (0, 22, 23, 29)] == [False, False, True, True]
    assert "acc pairs.group" not in titles


def test_the_report_says_how_perplexity_was_measured(record: dict[str, Any]) -> None:
    record["about"]["evaluation"]["protocol"] = "8 windows of 512 tokens, no overlap, no context carried over"

    assert "8 windows of 512 tokens, no overlap" in report.headline(record)
    assert "test tokens" not in report.headline(record)


def soups(chosen: float, other: float) -> dict[str, Any]:
    """Two members and a soup of them, of these shifts in nats per window against the soup; the first is best on selection."""

    def made(name: str, shift: float, **more: Any) -> dict[str, Any]:
        kept = windows(2, 40)
        kept["windows"]["nll"] = [x + shift for x in kept["windows"]["nll"]]
        trial = records.trial(name, name, {}, 20.0, 1e6, **kept, **more)
        return {**trial, "trial": name}

    members = [made("chosen", chosen), made("other", other)]
    return records.record([*members, made("soup", 0.0, members=["chosen", "other", "path0"])])


def test_a_soup_is_held_against_the_member_that_the_selection_split_chose_on_the_test_split() -> None:
    """Not against the one that is best on the test split, which nobody could have known."""
    (said,) = reading.against_members(soups(chosen=3.0, other=-5.0))

    assert said.startswith("soup, of 3 members: perplexity on the test split −")
    assert "against chosen, the best of them on the selection split: beyond noise." in said
    assert said in reading.sentences(soups(chosen=3.0, other=-5.0))
    (said,) = reading.against_members(soups(chosen=0.0, other=-5.0))
    assert "±0" in said
    assert said.endswith("not distinguishable.")


def test_of_very_many_merges_the_report_says_how_many_it_leaves_out() -> None:
    record = soups(1.0, 2.0)
    record["trials"] += [{**record["trials"][2], "trial": f"soup{i}"} for i in range(7)]

    said = reading.against_members(record)

    assert len(said) == reading.MOST_COMPARISONS + 1
    assert said[-1] == "2 more merges were made: see the table."


def test_a_soup_whose_best_member_is_no_trial_or_did_not_finish_is_held_against_none() -> None:
    record = soups(1.0, 2.0)
    record["trials"][2]["members"] = ["path0", "chosen"]
    assert reading.against_members(record) == []
    record["trials"][2]["members"] = ["chosen"]
    record["trials"][0]["status"] = "failed"
    assert reading.against_members(record) == []
