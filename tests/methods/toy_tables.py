"""Additive toy level tables, where brute force knows the answer. For the tests of what allocates levels."""

from __future__ import annotations

import itertools
from typing import Any

from pare.methods.contract import AllocateMethod, LevelTable, Problem, State

BITS = [2, 3, 4, 5, 6]
SIZES = [640, 640, 640, 640, 1280, 1280]


def toy(seed: int = 0) -> LevelTable:
    """Six linears of two sizes; bytes of codes and 10 scales; convex errors that differ a hundredfold between linears."""
    weight = [(1 + (3 * i + seed) % 5) ** 3 for i in range(6)]
    return LevelTable(
        linears=[f"layers.{i // 3}.{i}.weight" for i in range(6)],
        blocks=[0, 0, 0, 1, 1, 1],
        sizes=SIZES,
        levels=list(BITS),
        cost=[[size * bits // 8 + 10 for bits in BITS] for size in SIZES],
        error=[[w * 4.0 ** (2 - bits) for bits in BITS] for w in weight],
    )


def problem(**changes: Any) -> Problem:
    return Problem(**{"table": toy(), "windows": 4, "length": 512, **changes})


def harm(table: LevelTable, choice: list[int]) -> float:
    return sum(error[k] for error, k in zip(table.error, choice, strict=True))


def solve(method: AllocateMethod, given: Problem) -> tuple[list[int], State, list[list[list[int]]]]:
    """The answer, the last state and the candidates of every round; fitness is the summed error, counted like tokens."""
    state, rounds = method.start(given), []
    while questions := method.ask(given, state, 1000):
        rounds.append([question.choice for question in questions])
        told = [harm(given.table, question.choice) for question in questions]
        state = method.tell(given, state, told, sum(n for q in questions for _, n in q.pieces))
        assert len(rounds) < 2000
    return method.answer(given, state), state, rounds


def best_of_all(table: LevelTable, budget: int) -> float:
    every = itertools.product(range(len(BITS)), repeat=6)
    return min(harm(table, list(choice)) for choice in every if table.bytes(choice) <= budget)
