"""Merges that ask many questions: the evolved merge and the learned soup."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.contract import Candidate, Context, Member, Merged
from pare.methods.merge.evolved import Evolved
from pare.methods.merge.model_soups import ModelSoups
from pare.methods.parts.formula import Dense, Formula, LowRank

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)] + ["model.norm.weight"]
BASE = {name: torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}


def vectors(seed: int) -> dict[str, Tensor]:
    return {name: torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * seed + i)) for i, name in enumerate(NAMES)}


def members(n: int, scores: list[float] | None = None) -> list[Member]:
    made = []
    for i in range(n):
        formulas = {name: Formula([Dense(BASE[name] + d)]) for name, d in vectors(i + 1).items()}
        made.append(Member(f"m{i}", scores[i] if scores else 50.0 + i, NAMES, formulas.get))
    return made


class Distance:
    """A loss that is known to the last digit: half the squared distance from a mixture of the members."""

    def __init__(self, shares: Callable[[str], list[float]]) -> None:
        self.target = {name: BASE[name] + sum(s * vectors(i + 1)[name] for i, s in enumerate(shares(name))) for name in NAMES}
        self.asked: list[float] = []

    def weights(self, candidate: Candidate) -> dict[str, Tensor]:
        found = dict(candidate)
        return {name: formula.materialise() + (BASE[name] if formula.op == "add" else 0) for name, formula in found.items()} | {
            name: BASE[name] for name in NAMES if name not in found
        }

    def __call__(self, candidate: Candidate) -> float:
        own = self.weights(candidate)
        self.asked.append(sum((own[name] - self.target[name]).double().square().sum().item() / 2 for name in NAMES))
        return self.asked[-1]

    def slopes(self, candidate: Candidate, along: Callable[[str, Tensor], list[float]]) -> tuple[float, dict[str, list[float]]]:
        own = self.weights(dict(candidate).items())
        return self(own_as(own)), {name: along(name, own[name] - self.target[name]) for name in NAMES}


def own_as(own: dict[str, Tensor]) -> Candidate:
    return [(name, Formula([Dense(weight)])) for name, weight in own.items()]


def run(method: Any, given: list[Member], evaluate: Any, seed: int = 0) -> Merged:
    merged: Merged = method.merge(given, BASE.__getitem__, evaluate, Context(torch.device("cpu"), seed))
    return merged


def by_layer(name: str) -> list[float]:
    return [0.9, 0.1, 0.0] if ".0." in name or ".1." in name else [0.2, -0.5, 1.1]


# --- evolved ------------------------------------------------------------------------------------------------------------


def test_evolution_finds_the_weights_of_each_group_of_blocks() -> None:
    evaluate = Distance(by_layer)

    merged = run(Evolved(evaluations=600, blocks=2), members(3), evaluate)

    shares = merged.decisions[-1]["shares"]
    assert list(shares) == ["", "model.layers.0", "model.layers.1"]
    assert list(shares["model.layers.0"].values()) == pytest.approx([0.9, 0.1, 0.0], abs=0.02)
    assert list(shares["model.layers.1"].values()) == pytest.approx([0.2, -0.5, 1.1], abs=0.02)
    assert merged.score == min(evaluate.asked) < 1e-2
    assert evaluate(merged.formulas) == pytest.approx(merged.score, abs=1e-9)


def test_evolution_begins_with_the_mean_and_is_never_worse_than_it_or_the_best_member() -> None:
    mean = Distance(lambda name: [1 / 3] * 3)
    merged = run(Evolved(evaluations=40), members(3), mean)
    assert mean.asked[0] < 1e-9
    assert merged.weights == pytest.approx({"m0": 1 / 3, "m1": 1 / 3, "m2": 1 / 3})

    best = run(Evolved(evaluations=40), members(3, scores=[3.0, -1.0, 2.0]), Distance(by_layer))
    assert best.score == -1.0
    assert best.weights == {"m1": 1.0, "m2": 0.0, "m0": 0.0}
    for name, formula in best.formulas:
        assert torch.allclose(formula.materialise(), BASE[name] + vectors(2)[name], atol=1e-6)


@pytest.mark.parametrize(("evaluations", "asked"), [(1, 1), (10, 1), (40, 1 + 3 * 10), (41, 1 + 4 * 10)])
def test_evolution_never_oversteps_its_evaluations(evaluations: int, asked: int) -> None:
    """Of three groups of three members, nine unknowns and ten candidates in a generation."""
    evaluate = Distance(by_layer)

    run(Evolved(evaluations=evaluations, blocks=2), members(3), evaluate)

    assert len(evaluate.asked) == asked <= evaluations


def test_evolution_depends_on_the_seed_and_on_nothing_else() -> None:
    asked = []
    for seed in (1, 1, 2):
        evaluate = Distance(by_layer)
        run(Evolved(evaluations=30, blocks=2), members(3), evaluate, seed)
        asked.append(evaluate.asked)

    assert asked[0] == asked[1]
    assert asked[0][0] == asked[2][0]
    assert asked[0][1:] != asked[2][1:]


def test_evolved_adapters_are_adapters() -> None:
    parts = [LowRank(torch.randn(2, 5), torch.randn(3, 2)) for _ in range(2)]
    given = [Member(f"m{i}", 9.0, NAMES[:1], {NAMES[0]: Formula([part], "add")}.get) for i, part in enumerate(parts)]

    merged = run(Evolved(evaluations=20), given, Distance(lambda name: [0.0, 0.0, 0.0]))

    assert [(formula.op, formula.parts[0].kind) for _, formula in merged.formulas] == [("add", "low_rank")]


def test_a_candidate_without_a_finite_score_is_never_the_answer() -> None:
    class Broken(Distance):
        def __call__(self, candidate: Candidate) -> float:
            score = super().__call__(candidate)
            return math.inf if len(self.asked) % 2 else score

    merged = run(Evolved(evaluations=30, blocks=2), members(3), Broken(by_layer))

    assert math.isfinite(merged.score)
    assert merged.decisions[1]["score"] is None


# --- the learned soup ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["layer", "model"])
def test_the_learned_soup_finds_the_shares_that_lower_the_loss(per: str) -> None:
    def target(name: str) -> list[float]:
        return [0.6, 0.3, 0.1] if per == "model" else [0.7, 0.2, 0.1] if ".0." in name else [0.1, 0.1, 0.8]

    evaluate = Distance(target)

    merged = run(ModelSoups(mode="learned", per=per, steps=80), members(3), evaluate)

    shares = merged.decisions[-1]["shares"]
    assert set(shares) == ({"", *(f"model.layers.{i}" for i in range(4))} if per == "layer" else {""})
    for group, own in shares.items():
        assert list(own.values()) == pytest.approx(target(f"{group}."), abs=0.05), group
        assert sum(own.values()) == pytest.approx(1)
    assert merged.score == evaluate.asked[-1] < 0.1 * evaluate.asked[0]
    assert len(evaluate.asked) == 81


def test_learning_follows_the_slopes_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, slopes = Distance(lambda name: [0.5, 0.3, 0.2]), []

    class Watched(torch.optim.SGD):
        def __init__(self, parameters: Any, learning_rate: float, weight_decay: float) -> None:
            super().__init__(parameters, learning_rate)

        def step(self, closure: Any = None) -> None:
            slopes.append(self.param_groups[0]["params"][0].grad[0].tolist())
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    run(ModelSoups(mode="learned", per="model", steps=2, learning_rate=1e-3), members(3), evaluate)

    def loss(logits: Tensor) -> float:
        own = {n: BASE[n] + sum(s * vectors(i + 1)[n] for i, s in enumerate(logits.softmax(0).tolist())) for n in NAMES}
        return evaluate(own_as(own))

    for at, found in zip((torch.zeros(3), -1e-3 * torch.tensor(slopes[0])), slopes, strict=True):
        step = 1e-2 * torch.eye(3)
        expected = [(loss(at + step[i]) - loss(at - step[i])) / 2e-2 for i in range(3)]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_the_learned_soup_is_the_best_of_its_steps_and_never_worse_than_the_uniform_one() -> None:
    evaluate = Distance(lambda name: [1 / 3] * 3)

    merged = run(ModelSoups(mode="learned", steps=5, learning_rate=3.0), members(3), evaluate)

    assert merged.weights == pytest.approx({"m0": 1 / 3, "m1": 1 / 3, "m2": 1 / 3})
    assert merged.score == pytest.approx(evaluate.asked[0])


def test_one_member_is_its_own_learned_soup_at_no_cost() -> None:
    evaluate = Distance(by_layer)

    merged = run(ModelSoups(mode="learned"), members(1), evaluate)

    assert (merged.weights, merged.score, evaluate.asked) == ({"m0": 1.0}, 50.0, [])
