"""EvoPress: a (1 + lambda) evolutionary search over levels, every child of exactly the bytes of its parent.

    child = parent after min(u, v) level switches, u and v uniform on {1, 2, 3}
    level switch: of the linears of one size, one goes a level down and another one goes up, for the same bytes
    selection in stages: the survivors of one stage meet again on more tokens, in the last stage with the parent among them
    fitness = KL(dense || compressed), mean over tokens

The published schedule draws fresh tokens for every generation and spends a million on each. For a thousandth of that, two
things are done otherwise: the search starts from the answer of an exact solver; and the tokens of a stage contain those of
the stage before and are the same in every generation (`redraw=0`), so that the parent's fitness is known, a survivor pays
only for the tokens it has not seen, and fitness never gets worse. The published way is `start_from=uniform redraw=1`.

Source: Sieberling, Kuznedelev, Kurtic, Alistarh (2024), "EvoPress: Towards Optimal Dynamic Model Compression via
Evolutionary Search", arXiv:2410.14649, algorithm 1, in its mode for bit widths.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from pare.methods.contract import AllocateMethod, Level, LevelTable, Problem, Question, SettingsError, State, check, method
from pare.methods.ops.knapsack import cheapest_error

TRIES = 100
"""Mutations tried for one child before there is taken to be no other: near the ends of the range few switches are possible."""

Piece = tuple[int, int]
"""(window, so many tokens from its start)."""


@method("evopress", source="Sieberling et al. (2024), arXiv:2410.14649, algorithm 1")
@dataclass
class Evopress(AllocateMethod):
    draws_random_numbers = True

    start_from: str = "ilp"
    """The first parent: "ilp", the exact solver's answer; "uniform", all linears at the target, which must be a level; or
    "random", the best of `offspring` random allocations."""

    generations: int = 20
    """Generations at most, >= 0."""

    offspring: int = 8
    """Children of one generation, >= 1."""

    survivors: list[int] = field(default_factory=lambda: [2, 1])
    """Candidates that each stage of the selection leaves over: falling, and 1 in the end."""

    tokens: list[int] = field(default_factory=lambda: [512, 2048])
    """Tokens of each stage, rising."""

    redraw: int = 0
    """Generations after which other windows are drawn; 0 keeps the first ones."""

    token_budget: int = 60_000
    """The search ends before a generation that could bring all tokens, those of the scores included, above this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "start_from", one_of=("ilp", "uniform", "random"))
        check(self, "generations", at_least=0)
        check(self, "offspring", at_least=1)
        check(self, "redraw", at_least=0)
        s, t = self.survivors, self.tokens
        if not s or s[-1] != 1 or s[0] > self.offspring or any(a <= b for a, b in pairwise(s)):
            raise SettingsError(self.name, "survivors", s, f"falling numbers from at most offspring={self.offspring} to 1")
        if len(t) != len(s) or t[0] < 2 or any(a >= b for a, b in pairwise(t)):
            raise SettingsError(self.name, "tokens", t, f"rising numbers from at least 2, one for each of survivors={s}")

    @property
    def reads_errors(self) -> bool:
        return self.start_from == "ilp"

    @property
    def generations_at_most(self) -> int:
        return self.generations

    def check_levels(self, levels: Sequence[Level]) -> None:
        super().check_levels(levels)
        if self.start_from == "uniform" and self.target not in levels:
            raise SettingsError(self.name, "start_from", "uniform", f"ilp or random, as target={self.target} is no level")

    def start(self, problem: Problem) -> State:
        """Generation 0 selects the first parent like a child, but from candidates that have no parent."""
        if self.tokens[-1] > problem.windows * problem.length:
            pool = f"{problem.windows} windows of {problem.length} tokens"
            raise SettingsError(self.name, "tokens", self.tokens, f"at most {problem.windows * problem.length}, the {pool}")
        table, budget = problem.table, self.budget(problem.table)
        if self.start_from == "ilp":
            first = [cheapest_error(table.cost, table.error, budget)]
        elif self.start_from == "uniform":
            first = [[table.levels.index(self.target)] * len(table.linears)]
        else:
            rng = random.Random(f"start {problem.seed}")
            first = [random_choice(table, budget, rng) for _ in range(self.offspring)]
        stage = 0 if len(first) > 1 else len(self.tokens) - 1
        return {"generation": 0, "stage": stage, "parent": None, "open": first, "kl": [], "spent": problem.spent, "trace": []}

    def ask(self, problem: Problem, state: State, n: int) -> list[Question]:
        told = len(state["kl"])
        pieces = self.pieces(problem, state["generation"], state["stage"])
        return [Question(choice, pieces) for choice in state["open"][told : told + n]]

    def tell(self, problem: Problem, state: State, kl: Sequence[float], tokens: int) -> State:
        state = {**state, "kl": [*state["kl"], *kl], "spent": state["spent"] + tokens}
        if len(state["kl"]) < len(state["open"]):
            return state
        stage, parent = state["stage"], state["parent"]
        # The sort keeps the order of equals, in which the parent stands last: a child that is as good takes its place.
        best = sorted(range(len(state["open"])), key=lambda i: state["kl"][i])[: self.survivors[stage]]
        left = [state["open"][i] for i in best]
        if stage + 1 < len(self.tokens):
            return {**state, "stage": stage + 1, "open": self.contenders(left, parent, stage + 1), "kl": []}
        entry = {
            "generation": state["generation"],
            "kl": state["kl"][best[0]],
            "accepted": left[0] != parent,
            "changed": sum(a != b for a, b in zip(left[0], parent or left[0], strict=True)),
            "tokens": state["spent"],
        }
        state |= {"generation": state["generation"] + 1, "stage": 0, "parent": left[0], "trace": [*state["trace"], entry]}
        return {**state, "open": self.contenders(self.breed(problem, state), left[0], 0), "kl": []}

    def answer(self, problem: Problem, state: State) -> list[int]:
        parent: list[int] = state["parent"]
        return parent

    def contenders(self, candidates: list[list[int]], parent: list[int] | None, stage: int) -> list[list[int]]:
        """The candidates of a stage; in the last one the parent has to be beaten."""
        final = stage + 1 == len(self.tokens)
        return [*candidates, parent] if final and parent and candidates else candidates

    def breed(self, problem: Problem, state: State) -> list[list[int]]:
        """The children of the next generation; none where the search ends."""
        generation = state["generation"]
        stages = [self.pieces(problem, generation, i) for i in range(len(self.tokens))]
        known = self.pieces(problem, generation - 1, -1)
        most = new_tokens(stages[-1], known)  # the parent's
        for n, now, before in zip([self.offspring, *self.survivors], stages, [[], *stages], strict=False):
            most += n * new_tokens(now, before)
        if generation > self.generations or state["spent"] + most > self.token_budget:
            return []
        return children(problem.table, state["parent"], self.offspring, random.Random(f"{generation} {problem.seed}"))

    def pieces(self, problem: Problem, generation: int, stage: int) -> list[Piece]:
        """The text of a stage, exactly its number of tokens. Text of the last stage, in an order of the generation's own."""
        draw = generation // self.redraw if self.redraw else 0
        windows = shuffled([(w, problem.length) for w in range(problem.windows)], f"windows {draw} {problem.seed}")
        pool = cut(windows, self.tokens[-1])
        return cut(shuffled(pool, f"order {generation} {problem.seed}"), self.tokens[stage])


T = TypeVar("T")


def shuffled(items: list[T], seed: str) -> list[T]:
    return random.Random(seed).sample(items, len(items))


def cut(pieces: list[Piece], tokens: int) -> list[Piece]:
    """The first pieces, the last one cut short, of so many tokens in all; a rest of one token predicts none and is left out."""
    taken: list[Piece] = []
    for window, n in pieces:
        if tokens >= 2:
            taken.append((window, min(n, tokens)))
            tokens -= n
    return taken


def new_tokens(pieces: list[Piece], known: list[Piece]) -> int:
    """Tokens of the pieces that are not among the known ones."""
    return sum(n for window, n in pieces if (window, n) not in known)


def random_choice(table: LevelTable, budget: int, rng: random.Random) -> list[int]:
    """All linears at the first level that takes the budget or more, then random ones lower until the bytes are within it."""
    n = len(table.linears)
    choice = next(choice for k in range(len(table.levels)) if table.bytes(choice := [k] * n) >= budget)
    while table.bytes(choice) > budget:
        choice[rng.choice([i for i, k in enumerate(choice) if k > 0])] -= 1
    return choice


def children(table: LevelTable, parent: list[int], n: int, rng: random.Random) -> list[list[int]]:
    """At most n choices, different from each other and from the parent, of the bytes of the parent."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for i, size in enumerate(table.sizes):
        by_size[size].append(i)
    found: list[list[int]] = []
    for _ in range(n * TRIES):
        if len(found) == n:
            break
        child = parent.copy()
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            # A size is drawn as often as there are linears of it.
            switch(table, by_size[rng.choice(table.sizes)], child, rng)
        if child != parent and child not in found:
            found.append(child)
    return found


def switch(table: LevelTable, group: list[int], choice: list[int], rng: random.Random) -> None:
    """Lowers one linear of the group by a level and raises another that takes the bytes this frees, where there are such."""
    lower = [i for i in group if choice[i] > 0]
    if not lower:
        return
    down = rng.choice(lower)
    freed = table.cost[down][choice[down]] - table.cost[down][choice[down] - 1]
    top = len(table.levels) - 1
    steps = {i: table.cost[i][choice[i] + 1] - table.cost[i][choice[i]] for i in group if choice[i] < top and i != down}
    higher = [i for i, bytes_ in steps.items() if bytes_ == freed]
    if higher:
        choice[down] -= 1
        choice[rng.choice(higher)] += 1
