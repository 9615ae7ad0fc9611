"""AWQ against plain loops over its equations, and against what must hold of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.anatomy.describe import Fold
from pare.methods.contract import Context, InputGroup
from pare.methods.ops.statistics import Gram, MeanMagnitude
from pare.methods.parts.formula import Dense
from pare.methods.quantize.awq import Awq
from pare.methods.quantize.rtn import Rtn

NORM = Fold("norm", ("norm.weight",))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(features: int = 64, loud: int | None = None) -> Tensor:
    """512 tokens of features of unlike size; one of them 50 times as large, if asked for."""
    x = normal(512, features, seed=1) * normal(features, seed=2).exp()
    if loud is not None:
        x = normal(512, features, seed=1)
        x[:, loud] *= 50
    return x


def group_of(x: Tensor, fold: Fold | None = NORM, **weights: Tensor) -> InputGroup:
    statistics = {}
    for need in (Gram, MeanMagnitude):
        statistic = need()
        statistic.start(x.shape[1], x.device)
        statistic.add(x)
        statistics[need.name] = statistic.finish()
    return InputGroup("the.group", weights, statistics=statistics, fold=fold)


def factors(method: Awq, group: InputGroup, notes: dict[str, float] | None = None) -> Tensor:
    reports: Any = (lambda name, value: notes.update({name: value})) if notes is not None else (lambda name, value: None)
    s = method.fold(group, Context(torch.device("cpu"), report=reports))
    assert s is not None
    return s


def made(method: Awq, group: InputGroup, name: str = "w") -> Tensor:
    return method.compress(group, Context(torch.device("cpu")))[name].materialise()


def rtn(weight: Tensor, bits: int, g: int) -> Tensor:
    return Rtn(bits=bits, group_size=g, symmetric=False).round_to_nearest(weight).materialise()


def test_the_factors_are_those_that_a_plain_loop_over_the_outputs_finds() -> None:
    x, w = inputs(), normal(24, 64)
    s = factors(Awq(bits=3, group_size=16), group_of(x, w=w))

    a = x.abs().mean(0)
    errors, tried = [], []
    for k in range(20):
        of_k = a ** (k / 20)
        of_k = of_k / (of_k.max() * of_k.min()).sqrt()
        rounded = rtn(w * of_k, 3, 16) / of_k
        errors.append(float(((x @ rounded.T - x @ w.T) ** 2).sum()))
        tried.append(of_k)
    best = tried[errors.index(min(errors))]
    assert errors.index(min(errors)) > 0
    torch.testing.assert_close(s, best)


@pytest.mark.parametrize("duo", [False, True])
def test_every_candidate_is_level_and_the_first_changes_nothing(duo: bool) -> None:
    x, w = inputs(), normal(24, 64)
    x[:, 5] = 0
    magnitude = group_of(x, w=w).statistics["mean_magnitude"]
    found = list(Awq(duo=duo).candidates(w, magnitude))

    assert torch.equal(found[0], torch.ones(64))
    assert len(found) == (21 if duo else 20)
    live = magnitude > 0
    for s in found:
        assert float(s[live].max() * s[live].min()) == pytest.approx(1, rel=1e-5)
        assert s[5] == 1, "a feature that nothing excites"


@pytest.mark.parametrize("settings", [{}, {"duo": True}, {"bits": 2}, {"symmetric": True, "bits": 3}])
def test_no_group_is_worse_off_than_with_plain_rounding(settings: dict[str, Any]) -> None:
    for seed in range(4):
        notes: dict[str, float] = {}
        factors(Awq(group_size=16, **settings), group_of(inputs(), w=normal(24, 64, seed=seed)), notes)
        assert notes["awq/error_with_scaling"] <= notes["awq/error_without_scaling"]


def test_a_loud_feature_is_scaled_up_and_loses_less() -> None:
    x, w = inputs(256, loud=37), normal(64, 256)
    method = Awq(bits=4, group_size=128, clip=False)
    group = group_of(x, w=w)
    s = factors(method, group)

    assert s[37] > 1.5
    scaled = rtn(w * s, 4, 128) / s
    plain = rtn(w, 4, 128)
    assert (scaled - w)[:, 37].square().mean() < (plain - w)[:, 37].square().mean() / 3
    lost = [(x @ (w - other).T).square().sum() for other in (scaled, plain)]
    assert lost[0] < 0.4 * lost[1]


def test_cutting_never_costs_a_row_and_group_more_than_plain_rounding() -> None:
    x, w = inputs(), normal(24, 64)
    w[3, 7] = 9.0
    method = Awq(bits=3, group_size=16)
    cut = method.cut(w, group_of(x, w=w).statistics["gram"])

    def lost(rounded: Tensor) -> Tensor:
        error = (rounded - w).unflatten(1, (4, 16))
        return torch.stack([(x[:, 16 * k : 16 * k + 16] @ error[:, k].T).square().sum(0) for k in range(4)], 1)

    assert (lost(rtn(cut, 3, 16)) <= lost(rtn(w, 3, 16)) * (1 + 1e-4)).all()
    assert lost(rtn(cut, 3, 16)).sum() < 0.9 * lost(rtn(w, 3, 16)).sum()
    assert (cut.abs() <= w.abs()).all()


def test_queries_and_keys_are_not_cut() -> None:
    x, w = inputs(), normal(24, 64)
    w[3, 7] = 9.0
    names = {"self_attn.q_proj.weight": w, "self_attn.v_proj.weight": w}
    found = Awq(bits=3, group_size=16).compress(group_of(x, **names), Context(torch.device("cpu")))

    assert torch.equal(found["self_attn.q_proj.weight"].materialise(), rtn(w, 3, 16))
    assert not torch.equal(found["self_attn.v_proj.weight"].materialise(), rtn(w, 3, 16))


def test_a_short_last_group_is_cut_like_the_others() -> None:
    x, w = inputs(40), normal(8, 40)
    found = made(Awq(bits=3, group_size=16, short_last_group=True), group_of(x, w=w))
    alone = made(Awq(bits=3, group_size=8), group_of(x[:, 32:], w=w[:, 32:]))
    torch.testing.assert_close(found[:, 32:], alone)


def test_features_that_one_feature_feeds_share_a_factor() -> None:
    x, w = inputs(32), normal(16, 32)
    fold = Fold("linear", ("v.weight",), repeat=2, head=8)
    s = factors(Awq(bits=3, group_size=16), group_of(x, fold, w=w)).view(2, 2, 8)
    assert torch.equal(s[:, 0], s[:, 1])
    assert s.std() > 0.01


def test_where_nothing_can_be_folded_or_was_seen_nothing_is_scaled_and_that_is_written_down() -> None:
    for group in (group_of(inputs(), None, w=normal(8, 64)), group_of(torch.zeros(4, 64), w=normal(8, 64))):
        notes: dict[str, float] = {}
        context = Context(torch.device("cpu"), report=lambda name, value, notes=notes: notes.update({name: value}))  # type: ignore[misc]
        assert Awq().fold(group, context) is None
        assert notes == {"awq/not_scaled": 1.0}


def test_a_stage_that_only_scales_rounds_nothing() -> None:
    w = normal(8, 64)
    (part,) = Awq(scale_only=True).compress(group_of(inputs(), w=w), Context(torch.device("cpu")))["w"].parts
    assert isinstance(part, Dense)
    assert torch.equal(part.weight, w)
