"""The exact solver against brute force, and the errors that it is fed."""

from __future__ import annotations

import itertools
import random

import pytest

from pare.methods.ops.knapsack import cheapest_error
from pare.methods.ops.level_errors import DENSE, measured_errors, one_lowered, relative_errors


def tables(n: int, layers: int, levels: int) -> list[tuple[list[list[int]], list[list[float]]]]:
    """Random costs, all different within a layer, and random errors that need not fall when costs rise."""
    rng = random.Random(0)
    return [
        (
            [sorted(rng.sample(range(1, 40), levels)) for _ in range(layers)],
            [[rng.random() for _ in range(levels)] for _ in range(layers)],
        )
        for _ in range(n)
    ]


def summed(values: list[list[float]] | list[list[int]], choice: tuple[int, ...] | list[int]) -> float:
    return sum(row[k] for row, k in zip(values, choice, strict=True))


def by_brute_force(cost: list[list[int]], error: list[list[float]], budget: int) -> float:
    every = itertools.product(range(len(cost[0])), repeat=len(cost))
    return min(summed(error, choice) for choice in every if summed(cost, choice) <= budget)


@pytest.mark.parametrize(("layers", "levels"), [(4, 3), (5, 4), (1, 5), (6, 1)])
def test_it_finds_what_brute_force_finds_and_never_exceeds_the_budget(layers: int, levels: int) -> None:
    for cost, error in tables(12, layers, levels):
        lowest, highest = sum(map(min, cost)), sum(map(max, cost))
        for budget in (lowest, (lowest + highest) // 2, highest, highest + 5):
            choice = cheapest_error(cost, error, budget)

            assert summed(cost, choice) <= budget
            assert summed(error, choice) == pytest.approx(by_brute_force(cost, error, budget), abs=1e-6)


def test_more_budget_never_gives_more_error() -> None:
    ((cost, error),) = tables(1, 8, 4)
    budgets = range(sum(map(min, cost)), sum(map(max, cost)), 7)

    found = [summed(error, cheapest_error(cost, error, budget)) for budget in budgets]

    assert len(found) > 10
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(found))


def test_neither_the_order_of_layers_nor_a_level_told_twice_changes_the_least_error() -> None:
    ((cost, error),) = tables(1, 6, 3)
    budget = sum(row[1] for row in cost)
    least = summed(error, cheapest_error(cost, error, budget))
    order = [3, 0, 5, 1, 4, 2]

    permuted = [[row[i] for i in order] for row in (cost, error)]
    twice = [[[*layer, layer[1]] for layer in table] for table in (cost, error)]

    assert summed(permuted[1], cheapest_error(*permuted, budget)) == pytest.approx(least)
    assert summed(twice[1], cheapest_error(*twice, budget)) == pytest.approx(least)


def test_costs_of_hundreds_of_megabytes_and_tiny_errors_are_solved_to_the_byte() -> None:
    cost, error = [[10**9, 10**9 + 1], [10**9, 10**9 + 2]], [[3e-9, 1e-9], [2e-9, 1e-9]]

    assert cheapest_error(cost, error, 2 * 10**9 + 1) == [1, 0]
    assert cheapest_error(cost, error, 2 * 10**9 + 2) == [1, 0]
    assert cheapest_error(cost, error, 2 * 10**9 + 3) == [1, 1]


def test_a_budget_below_the_cheapest_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="a budget of 4 is below 5"):
        cheapest_error([[2, 3], [3, 4]], [[1.0, 0.0], [1.0, 0.0]], 4)


def test_an_error_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        cheapest_error([[2, 3]], [[float("nan"), 0.0]], 4)


def test_one_linear_at_a_time_is_lowered_and_all_others_are_dense() -> None:
    assert one_lowered(3) == [[0, DENSE, DENSE], [DENSE, 0, DENSE], [DENSE, DENSE, 0]]


def test_a_measurement_at_the_lowest_level_is_carried_to_the_others_by_the_output_error() -> None:
    assert measured_errors([0.5, -1e-9, 0.1], [[4.0, 1.0], [2.0, 1.0], [0.0, 0.0]]) == [[0.5, 0.125], [0.0, 0.0], [0.0, 0.0]]


def test_relative_errors_are_shares_of_the_output() -> None:
    assert relative_errors([[2.0, 1.0], [0.0, 0.0]], [4.0, 0.0]) == [[0.5, 0.25], [0.0, 0.0]]
