"""ILP on additive toy tables, where brute force knows the answer."""

from __future__ import annotations

import pytest

from pare.methods.allocate.ilp import Ilp
from tests.methods.toy_tables import best_of_all, harm, problem, solve, toy


@pytest.mark.parametrize("target", [2, 2.5, 3, 3.7, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_exact_solver_agrees_with_brute_force_at_every_target(target: float, seed: int) -> None:
    given, method = problem(table=toy(seed)), Ilp(target=target)

    choice, _, rounds = solve(method, given)

    assert rounds == []
    assert given.table.bytes(choice) <= method.budget(given.table)
    assert harm(given.table, choice) == pytest.approx(best_of_all(given.table, method.budget(given.table)))
