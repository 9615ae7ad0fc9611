from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pare.methods.ops import evolution
from pare.methods.ops.evolution import Rates, Search


def minimise(value: Callable[[Tensor], float], mean: Tensor, sigma: float, generations: int, seed: int = 0) -> Search:
    rates, generator = Rates.of(len(mean)), torch.Generator().manual_seed(seed)
    search = evolution.start(mean, sigma)
    for _ in range(generations):
        candidates = evolution.ask(search, rates, generator)
        search = evolution.tell(search, rates, candidates, [value(x) for x in candidates])
    return search


def test_the_rates_are_those_of_the_tutorial() -> None:
    """For ten unknowns: ten candidates, five parents of mass 3.17; the rates of the covariance times (n + 2) / 3 = 4."""
    rates = Rates.of(10)

    assert (rates.candidates, len(rates.weights)) == (10, 5)
    raw = [math.log(5.5) - math.log(i) for i in range(1, 6)]
    assert rates.weights.tolist() == pytest.approx([w / sum(raw) for w in raw])
    mass = sum(raw) ** 2 / sum(w * w for w in raw)
    assert rates.mass == pytest.approx(mass) == pytest.approx(3.167, abs=1e-3)
    assert rates.step == pytest.approx((mass + 2) / (15 + mass))
    assert rates.damping == pytest.approx(1 + rates.step)
    assert rates.path == pytest.approx((4 + mass / 10) / (14 + mass / 5))
    assert rates.rank_one == pytest.approx(4 * 2 / (11.3**2 + mass))
    assert rates.rank_many == pytest.approx(4 * 2 * (mass - 2 + 1 / mass) / (144 + mass))


def test_it_finds_the_lowest_point_of_a_sphere_and_of_a_long_valley() -> None:
    scales = torch.logspace(0, 2, 8, dtype=torch.float64)
    target = torch.linspace(-1, 1, 8, dtype=torch.float64)

    sphere = minimise(lambda x: float((x - target).square().sum()), torch.zeros(8), 0.5, 200)
    valley = minimise(lambda x: float((scales * (x - target)).square().sum()), torch.zeros(8), 0.5, 400)

    assert (sphere.mean - target).norm() < 1e-6
    assert (valley.mean - target).norm() < 1e-4
    assert valley.variance[0] > 100 * valley.variance[-1]


def test_only_the_order_of_the_values_counts() -> None:
    def value(x: Tensor) -> float:
        return float((x - 0.3).abs().sum())

    plain = minimise(value, torch.zeros(5), 0.3, 20)
    bent = minimise(lambda x: math.exp(3 * value(x)) - 7, torch.zeros(5), 0.3, 20)

    assert torch.equal(plain.mean, bent.mean)
    assert plain.sigma == bent.sigma


@pytest.mark.parametrize("is_steady", [True, False])
def test_a_step_is_that_of_the_update_written_out_for_each_unknown(is_steady: bool) -> None:
    """Steady: the path of the steps is no longer than chance makes it, so that the covariance may follow it."""
    rates = Rates.of(3)
    torch.manual_seed(0)
    mean, variance, step_path, path = torch.randn(4, 3, dtype=torch.float64)
    step_path = step_path * (0.1 if is_steady else 30.0)
    search = Search(mean, 0.7, variance.abs() + 0.1, step_path, path, generation=4)
    candidates = evolution.ask(search, rates, torch.Generator().manual_seed(0))
    values = torch.randn(rates.candidates).tolist()

    found = evolution.tell(search, rates, candidates, values)

    order = sorted(range(len(values)), key=values.__getitem__)
    w, mu = rates.weights.tolist(), len(rates.weights)
    cs, cc, c1, cm, mass = rates.step, rates.path, rates.rank_one, rates.rank_many, rates.mass
    expected_norm = math.sqrt(3) * (1 - 1 / 12 + 1 / 189)
    norm, new_path = 0.0, []
    for j in range(3):
        y = sum(w[i] * (candidates[order[i], j].item() - mean[j].item()) / 0.7 for i in range(mu))
        assert found.mean[j].item() == pytest.approx(mean[j].item() + 0.7 * y)
        p = (1 - cs) * step_path[j].item() + math.sqrt(cs * (2 - cs) * mass) * y / math.sqrt(search.variance[j].item())
        assert found.step_path[j].item() == pytest.approx(p)
        norm += p * p
        new_path.append(y)
    norm = math.sqrt(norm)
    assert found.sigma == pytest.approx(0.7 * math.exp(cs / rates.damping * (norm / expected_norm - 1)))
    steady = norm / math.sqrt(1 - (1 - cs) ** 10) < (1.4 + 2 / 4) * expected_norm
    assert steady == is_steady
    for j in range(3):
        p = (1 - cc) * path[j].item() + steady * math.sqrt(cc * (2 - cc) * mass) * new_path[j]
        assert found.path[j].item() == pytest.approx(p)
        many = sum(w[i] * ((candidates[order[i], j].item() - mean[j].item()) / 0.7) ** 2 for i in range(mu))
        kept = 1 - c1 - cm + (0 if steady else c1 * cc * (2 - cc))
        assert found.variance[j].item() == pytest.approx(kept * search.variance[j].item() + c1 * p * p + cm * many)


def test_candidates_are_spread_as_the_search_says() -> None:
    search = Search(torch.tensor([1.0, -2.0]).double(), 0.5, torch.tensor([4.0, 0.25]).double(), *torch.zeros(2, 2).double())

    drawn = evolution.ask(search, Rates(2, 20000), torch.Generator().manual_seed(0))

    assert drawn.mean(0).tolist() == pytest.approx([1.0, -2.0], abs=0.03)
    assert drawn.std(0).tolist() == pytest.approx([1.0, 0.25], rel=0.03)


def test_values_that_are_no_numbers_rank_last_and_of_equal_ones_the_earlier_counts() -> None:
    rates = Rates(2, 4)
    search = evolution.start(torch.zeros(2), 1.0)
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 3.0]], dtype=torch.float64)

    found = evolution.tell(search, rates, candidates, [math.nan, 1.0, 1.0, math.inf])

    assert found.mean.tolist() == pytest.approx((rates.weights @ candidates[[1, 2]]).tolist())
