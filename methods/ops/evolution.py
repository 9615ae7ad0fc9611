"""A search for the smallest value of a function of a few numbers, of which only the order of its values is used: sep-CMA-ES.

    x_k = m + sigma * D z_k,  z_k ~ N(0, I),  D diagonal;  m, sigma and D follow the better half of each generation

Source: Ros, Hansen (2008), "A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity", algorithm 1; rates as
in Hansen (2016), "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772, table 1, the two of the covariance times
(n + 2) / 3. A diagonal covariance adapts in a number of generations that grows with n and not with n^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rates:
    """What follows from the number of unknowns and of candidates in a generation alone."""

    n: int
    candidates: int

    @classmethod
    def of(cls, n: int, candidates: int = 0) -> Rates:
        """candidates: of a generation, at least 2; 0: as many as is usual, 4 + floor(3 ln n)."""
        return cls(n, candidates or 4 + int(3 * math.log(n)))

    @cached_property
    def weights(self) -> Tensor:
        """Of the better half, the best first, (candidates // 2,), float64; they sum to 1."""
        ranks = torch.arange(1, self.candidates // 2 + 1, dtype=torch.float64)
        weights = math.log((self.candidates + 1) / 2) - ranks.log()
        return weights / weights.sum()

    @property
    def mass(self) -> float:
        """How many candidates the weighted mean is worth."""
        return 1 / float(self.weights.square().sum())

    @property
    def step(self) -> float:
        return (self.mass + 2) / (self.n + self.mass + 5)

    @property
    def damping(self) -> float:
        return 1 + 2 * max(0.0, math.sqrt((self.mass - 1) / (self.n + 1)) - 1) + self.step

    @property
    def path(self) -> float:
        return (4 + self.mass / self.n) / (self.n + 4 + 2 * self.mass / self.n)

    @property
    def rank_one(self) -> float:
        return min(1.0, 2 / ((self.n + 1.3) ** 2 + self.mass) * (self.n + 2) / 3)

    @property
    def rank_many(self) -> float:
        rate = 2 * (self.mass - 2 + 1 / self.mass) / ((self.n + 2) ** 2 + self.mass) * (self.n + 2) / 3
        return min(1 - self.rank_one, rate)


@dataclass(frozen=True)
class Search:
    """Where the search stands; every tensor (n,), float64."""

    mean: Tensor
    sigma: float
    variance: Tensor
    """The diagonal of the covariance, D^2."""
    step_path: Tensor
    path: Tensor
    generation: int = 0


def start(mean: Tensor, sigma: float) -> Search:
    mean = mean.double()
    return Search(mean, sigma, torch.ones_like(mean), torch.zeros_like(mean), torch.zeros_like(mean))


def ask(search: Search, rates: Rates, generator: torch.Generator) -> Tensor:
    """The candidates of a generation, (candidates, n)."""
    z = torch.randn(rates.candidates, rates.n, generator=generator, dtype=torch.float64)
    return search.mean + search.sigma * search.variance.sqrt() * z


def tell(search: Search, rates: Rates, candidates: Tensor, values: list[float]) -> Search:
    """The search after the values of `ask`'s candidates; of equal values the earlier counts as the better, NaN as the worst."""
    order = sorted(range(len(values)), key=lambda i: math.inf if math.isnan(values[i]) else values[i])
    best = candidates[order[: len(rates.weights)]]
    steps = (best - search.mean) / search.sigma
    moved = rates.weights @ steps

    c, generation = rates.step, search.generation + 1
    step_path = (1 - c) * search.step_path + math.sqrt(c * (2 - c) * rates.mass) * moved / search.variance.sqrt()
    expected = math.sqrt(rates.n) * (1 - 1 / (4 * rates.n) + 1 / (21 * rates.n**2))
    length = step_path.norm().item()
    sigma = search.sigma * math.exp(c / rates.damping * (length / expected - 1))

    is_steady = length / math.sqrt(1 - (1 - c) ** (2 * generation)) < (1.4 + 2 / (rates.n + 1)) * expected
    c = rates.path
    path = (1 - c) * search.path + is_steady * math.sqrt(c * (2 - c) * rates.mass) * moved
    kept = 1 - rates.rank_one - rates.rank_many + (not is_steady) * rates.rank_one * c * (2 - c)
    variance = kept * search.variance + rates.rank_one * path.square() + rates.rank_many * (rates.weights @ steps.square())
    return Search(search.mean + search.sigma * moved, sigma, variance, step_path, path, generation)
