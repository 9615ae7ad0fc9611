"""EvoPress on additive toy tables, where brute force knows the answer."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from pare.methods.allocate.evopress import Evopress, Piece, children, cut, new_tokens
from pare.methods.allocate.ilp import Ilp
from pare.methods.contract import LevelTable
from pare.methods.settings import SettingsError
from tests.methods.toy_tables import BITS, SIZES, harm, problem, solve, toy


def best_within_sizes(table: LevelTable, start: list[int]) -> float:
    """The least error among all choices that level switches can reach: of each size, the bytes of the start."""
    totals = [sum(k for k, size in zip(start, SIZES, strict=True) if size == wanted) for wanted in (640, 1280)]
    reached = [
        choice for choice in itertools.product(range(len(BITS)), repeat=6) if [sum(choice[:4]), sum(choice[4:])] == totals
    ]
    return min(harm(table, list(choice)) for choice in reached)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_reaches_the_optimum_of_a_separable_convex_fitness_within_200_generations(seed: int) -> None:
    given = problem(table=toy(seed), seed=seed)
    method = Evopress(start_from="uniform", target=4, generations=200, token_budget=10**9)

    choice, state, _ = solve(method, given)

    assert harm(given.table, choice) == pytest.approx(best_within_sizes(given.table, [2] * 6))
    assert harm(given.table, choice) < harm(given.table, [2] * 6)
    fitness = [entry["kl"] for entry in state["trace"]]
    assert all(later <= earlier for earlier, later in itertools.pairwise(fitness))


@pytest.mark.parametrize("start_from", ["ilp", "uniform", "random"])
def test_every_candidate_of_every_generation_has_the_bytes_of_its_start(start_from: str) -> None:
    given = problem()
    method = Evopress(start_from=start_from, target=3, generations=15, token_budget=10**9)

    choice, state, rounds = solve(method, given)

    first = state["trace"][0]
    assert first["generation"] == 0
    parent_bytes = given.table.bytes(choice)
    assert parent_bytes <= method.budget(given.table)
    searched = rounds[2 if start_from == "random" else 1 :]
    assert len(searched) == 30
    assert {given.table.bytes(candidate) for candidates in searched for candidate in candidates} == {parent_bytes}
    if start_from != "random":
        assert parent_bytes == given.table.bytes(rounds[0][0])


def test_a_search_that_starts_at_the_exact_answer_does_not_leave_it_on_an_additive_fitness() -> None:
    given = problem()

    choice, state, rounds = solve(Evopress(target=3, generations=5), given)

    assert rounds[0] == [choice]
    assert harm(given.table, choice) == pytest.approx(harm(given.table, solve(Ilp(target=3), given)[0]))
    assert not any(entry["accepted"] for entry in state["trace"][1:])


def test_children_are_different_from_each_other_and_few_where_few_are_possible() -> None:
    import random

    table = toy()
    made = children(table, [2] * 6, 16, random.Random(0))

    assert len(made) == 16
    assert len({tuple(child) for child in [*made, [2] * 6]}) == 17
    assert children(table, [0] * 6, 16, random.Random(0)) == []
    alone = children(table, [0, 0, 0, 0, 0, 1], 16, random.Random(0))
    assert alone == [[0, 0, 0, 0, 1, 0]]


def test_linears_of_one_size_but_other_bytes_do_not_switch_with_each_other() -> None:
    import random

    table = toy()
    table.cost[0] = [2 * cost for cost in table.cost[0]]

    made = children(table, [2] * 6, 20, random.Random(0))

    assert made
    assert all(child[0] == 2 for child in made)
    assert {table.bytes(child) for child in made} == {table.bytes([2] * 6)}


def test_a_search_without_any_possible_child_ends_at_its_start() -> None:
    choice, state, _ = solve(Evopress(start_from="uniform", target=2, generations=5), problem())

    assert choice == [0] * 6
    assert len(state["trace"]) == 1


def new(questions: list[Any], known: set[Any]) -> int:
    """Tokens of the questions' pieces that a cache of answers has not got."""
    asked = {(tuple(question.choice), piece) for question in questions for piece in question.pieces}
    tokens = sum(n for _, (_, n) in asked - known)
    known |= asked
    return tokens


def test_all_candidates_of_a_stage_read_the_same_text_of_exactly_its_tokens_and_stages_contain_each_other() -> None:
    given = problem(windows=8, length=128)
    method = Evopress(start_from="uniform", tokens=[128, 300, 700], survivors=[4, 2, 1], generations=4, target=3)
    state, seen, read = method.start(given), [], {}
    while questions := method.ask(given, state, 1000):
        stage = state["stage"]
        assert len({str(question.pieces) for question in questions}) == 1
        assert sum(n for _, n in questions[0].pieces) == method.tokens[stage]
        read[state["generation"], stage] = {window for window, _ in questions[0].pieces}
        seen.append((state["generation"], stage, len(questions)))
        state = method.tell(given, state, [harm(given.table, q.choice) for q in questions], 0)

    assert seen[:4] == [(0, 2, 1), (1, 0, 8), (1, 1, 4), (1, 2, 3)]
    assert all(read[g, 0] <= read[g, 1] <= read[g, 2] for g in range(1, 5))
    assert len({str(sorted(read[g, 2])) for g in range(5)}) == 1
    assert len({str(sorted(read[g, 0])) for g in range(1, 5)}) > 1


def test_windows_are_drawn_anew_after_redraw_generations() -> None:
    given, method = problem(windows=64), Evopress(tokens=[512, 4096], redraw=2)

    last = [sorted(method.pieces(given, generation, 1)) for generation in range(6)]

    assert last[0] == last[1] != last[2] == last[3] != last[4] == last[5]


@pytest.mark.parametrize("redraw", [0, 1])
def test_the_tokens_of_a_generation_are_what_it_reckons_with_and_the_budget_holds(redraw: int) -> None:
    """The card's count, offspring * t_1 + (survivors + parent) * t_2, less what nesting and fixed windows have known."""
    given = problem(windows=16, spent=1000)
    method = Evopress(start_from="uniform", target=4, generations=50, redraw=redraw, token_budget=40_000)
    state, known, spent = method.start(given), set(), []
    while questions := method.ask(given, state, 1000):
        tokens = new(questions, known)
        state = method.tell(given, state, [harm(given.table, q.choice) for q in questions], tokens)
        spent.append(tokens)

    published = 8 * 512 + (2 + 1) * 2048
    generations = [sum(pair) for pair in zip(spent[1::2], spent[2::2], strict=True)]
    assert spent[0] == 2048
    parent = new_tokens(method.pieces(given, 1, 1), method.pieces(given, 0, 1))
    assert parent > 0 if redraw else parent == 0
    assert generations[0] == published - 2 * 512 - 2048 + parent
    assert max(generations) <= generations[0] if redraw == 0 else max(generations) <= published
    assert state["spent"] == 1000 + sum(spent)
    assert 40_000 - published < state["spent"] <= 40_000
    assert [entry["tokens"] for entry in state["trace"]][-1] == state["spent"]


def test_a_rest_of_one_token_is_left_out_because_it_predicts_nothing() -> None:
    pool: list[Piece] = [(3, 100), (1, 100), (2, 100)]

    assert cut(pool, 150) == [(3, 100), (1, 50)]
    assert cut(pool, 201) == [(3, 100), (1, 100)]
    assert cut(pool, 202) == [(3, 100), (1, 100), (2, 2)]


def test_settings_that_contradict_each_other_are_refused_with_what_is_allowed() -> None:
    for settings, words in (
        ({"survivors": [2, 2, 1]}, "falling numbers from at most offspring=8 to 1"),
        ({"survivors": [16, 1]}, "falling numbers from at most offspring=8 to 1"),
        ({"survivors": [4, 2]}, "falling numbers from at most offspring=8 to 1"),
        ({"tokens": [512]}, "rising numbers from at least 2, one for each of survivors"),
        ({"tokens": [512, 512]}, "rising numbers from at least 2, one for each of survivors"),
        ({"start_from": "dp"}, "one of ilp, uniform, random"),
    ):
        with pytest.raises(SettingsError, match=words.replace("[", r"\[")):
            Evopress(**settings)


def test_a_start_at_a_target_between_levels_and_more_tokens_than_there_are_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"start_from must be ilp or random, as target=3\.5 is no level"):
        Evopress(start_from="uniform", target=3.5).check_levels(BITS)
    with pytest.raises(SettingsError, match="at most 1024, the 2 windows of 512 tokens"):
        Evopress().start(problem(windows=2))


def test_the_state_is_small_plain_json() -> None:
    _, state, _ = solve(Evopress(generations=3, target=3), problem())

    assert json.loads(json.dumps(state, allow_nan=False)) == state
