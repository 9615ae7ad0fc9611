"""Evolved merge: the weight of every member in every group of blocks, found by evolution on the selection windows.

    theta_l = theta_0,l + sum over members of x[g(l), i] d_i,l          x by sep-CMA-ES, fitness the mean next-token loss

It begins with the mean of all members, x = 1/n, which is its first question, and ends with the best of what it has tried, the
best member among that. So the answer scores no worse than either on the selection windows; whether that holds on others is for
the test split to say. Low-rank members make a low-rank result.

Source: Akiba et al. (2024), "Evolutionary Optimization of Model Merging Recipes", arXiv:2403.13187, section 3.1 (merging in the
parameter space). Differs: what is merged is a linear combination, where the paper has TIES with DARE; the covariance is
diagonal; and a generation that would overstep the number of evaluations is not begun. The paper's routing of layers is not
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pare.methods.contract import (
    Context,
    Evaluator,
    Member,
    Merged,
    MergeMethod,
    best_first,
    method,
    on_device,
    weight_by_weight,
)
from pare.methods.ops import evolution
from pare.methods.ops.task_vectors import combine, layer_of
from pare.methods.parts.formula import Formula
from pare.methods.settings import check


@method("evolved", source="Akiba et al. (2024), arXiv:2403.13187, section 3.1")
@dataclass
class Evolved(MergeMethod):
    draws_random_numbers = True

    evaluations: int = 60
    """Candidates that are scored at most, >= 1, each a pass over the selection windows; the first is the mean."""

    blocks: int = 4
    """Consecutive blocks of the model that share their weights, >= 1. What stands outside of blocks has weights of its own."""

    sigma: float = 0.1667
    """Standard deviation of the first generation about the mean, > 0."""

    population: int = 0
    """Candidates of one generation, >= 2; 0: 4 + floor(3 ln n) for n unknown weights."""

    def __post_init__(self) -> None:
        check(self, "evaluations", at_least=1)
        check(self, "blocks", at_least=1)
        check(self, "sigma", above=0)
        if self.population:
            check(self, "population", at_least=2)

    def questions(self, members: int) -> int:
        return self.evaluations

    def merge(self, members: Sequence[Member], base: Callable[[str], Tensor], evaluate: Evaluator, context: Context) -> Merged:
        members, base = best_first(members), on_device(base, context.device)
        names = [member.name for member in members]
        groups = sorted({layer_of(name, self.blocks) for member in members for name in member.names}) or [""]
        table = len(groups), len(members)

        def model(x: Tensor) -> Iterator[tuple[str, Formula]]:
            rows = dict(zip(groups, x.view(table).tolist(), strict=True))
            for name, formulas in weight_by_weight(members, context.device):
                shares = dict(zip(names, rows[layer_of(name, self.blocks)], strict=True))
                formula = combine(name, formulas, shares, base)
                if formula is not None:
                    yield name, formula

        best, best_x = members[0].score, torch.eye(*(table[1],) * 2, dtype=torch.float64)[0].repeat(table[0])
        decisions: list[dict[str, Any]] = [{"generation": None, "candidate": names[0], "score": best}]

        def tried(x: Tensor, generation: int) -> float:
            nonlocal best, best_x
            score = evaluate(model(x))
            known = score if math.isfinite(score) else None
            decisions.append({"generation": generation, "candidate": x.tolist(), "score": known, "better": score < best})
            if score < best:
                best, best_x = score, x
            return score

        if len(members) > 1:
            search = evolution.start(torch.full((math.prod(table),), 1 / table[1]), self.sigma)
            rates, generator = evolution.Rates.of(math.prod(table), self.population), context.generator()
            tried(search.mean, 0)
            while 1 + (search.generation + 1) * rates.candidates <= self.evaluations:
                candidates = evolution.ask(search, rates, generator)
                values = [tried(x, search.generation + 1) for x in candidates]
                search = evolution.tell(search, rates, candidates, values)
        means = dict(zip(names, best_x.view(table).mean(0).tolist(), strict=True))
        shares = {
            group: dict(zip(names, row, strict=True)) for group, row in zip(groups, best_x.view(table).tolist(), strict=True)
        }
        return Merged(means, model(best_x), best, [*decisions, {"shares": shares}])
