"""EoRA against the card: the best term of its rank for what the outputs have lost, whatever the weight is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.factorize.eora import EoRA
from pare.methods.parts.formula import Formula, LowRank
from pare.methods.settings import SettingsError

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = normal(300, 24, seed=1) @ normal(24, 24, seed=2) * torch.logspace(-1, 1, 24)
ORIGINAL, LEFT = normal(16, 24, seed=3), normal(16, 24, seed=3).round()


def term(method: EoRA, x: Tensor = X, left: Tensor = LEFT, report: Any = lambda name, value: None) -> LowRank:
    gram = 2 * x.T @ x / max(len(x), 1)
    group = InputGroup("group", {"w": left}, statistics={"gram": gram}, original={"w": ORIGINAL})
    (formula,) = method.compress(group, Context(CPU, report=report)).values()
    assert formula.op == "add"
    (part,) = formula.parts
    assert isinstance(part, LowRank)
    return part


def lost(part: LowRank, x: Tensor = X) -> float:
    """|(D - B A) X^T|_F."""
    return float(((ORIGINAL - LEFT - part.materialise()).double() @ x.double().T).norm())


def exact(rank: int, **settings: Any) -> EoRA:
    return EoRA(rank=rank, value_dtype="float32", **settings)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_what_is_left_is_the_tail_of_the_singular_values_and_no_other_term_leaves_less(rank: int) -> None:
    values = torch.linalg.svdvals((ORIGINAL - LEFT).double() @ X.double().T)
    said: dict[str, float] = {}

    eora = term(exact(rank), report=said.__setitem__)

    assert lost(eora) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-3)
    assert said["eora/output_error"] == pytest.approx(float(values[rank:].square().sum()) * 2 / len(X), rel=1e-3)
    assert lost(eora) < lost(term(exact(rank, space="scale"))) < lost(term(exact(rank, space="plain")))


def test_the_whole_rank_leaves_nothing() -> None:
    assert lost(term(exact(16))) < 1e-3 * float(((ORIGINAL - LEFT) @ X.T).norm())


def test_with_inputs_alike_in_all_directions_it_is_plain_svd() -> None:
    x = torch.linalg.qr(normal(24, 24))[0]
    u, s, vt = torch.linalg.svd(ORIGINAL - LEFT)

    torch.testing.assert_close(term(exact(5), x).materialise(), u[:, :5] * s[:5] @ vt[:5], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(term(exact(5, space="plain")).materialise(), u[:, :5] * s[:5] @ vt[:5], rtol=1e-3, atol=1e-4)


def test_reading_the_data_again_changes_nothing() -> None:
    torch.testing.assert_close(term(exact(4)).materialise(), term(exact(4), torch.cat([X, X])).materialise())


def test_where_nothing_was_lost_the_term_is_zero() -> None:
    part = term(exact(4), left=ORIGINAL)

    assert not part.a.any()
    assert not part.b.any()


def test_fewer_tokens_than_features_give_a_finite_term() -> None:
    part = term(exact(12), X[:6])

    assert part.materialise().isfinite().all()
    assert part.a.abs().max() < 1e3
    assert float(((ORIGINAL - LEFT - part.materialise()) @ X[:6].T).norm()) < 1e-2
    assert tuple(part.a.shape) == (12, 24), "the rank that was asked for, with rows of zeros"


def test_both_ways_of_applying_it_agree() -> None:
    part = term(EoRA(rank=4))
    formula = Formula([part], "add")

    assert part.a.dtype == part.b.dtype == torch.bfloat16
    torch.testing.assert_close(formula.apply(X), X @ formula.materialise().T, rtol=1e-3, atol=1e-3)


def test_a_group_that_saw_nothing_is_repaired_by_plain_svd_and_it_is_said() -> None:
    said: dict[str, float] = {}

    part = term(exact(3), torch.zeros(5, 24), report=said.__setitem__)

    assert said["eora/fallbacks"] == said["eora/fallback/group"] == 1
    torch.testing.assert_close(part.materialise(), term(exact(3, space="plain")).materialise())
    with pytest.raises(ValueError, match="eora: group met infinite or NaN inputs"):
        term(exact(3), X * float("inf"))


def test_a_rank_larger_than_a_weight_is_refused_with_the_layer() -> None:
    with pytest.raises(SettingsError, match=r"eora.rank must be at most 24, the smaller side of w, got 32"):
        EoRA(rank=32).check_shapes({"w": (40, 24)})
    with pytest.raises(SettingsError, match=r"eora.space must be one of eigen, scale, plain"):
        EoRA(space="other")
