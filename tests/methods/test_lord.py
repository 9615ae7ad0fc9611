"""LoRD against the card: no other matrix of its rank keeps more of the outputs, and it never costs more than the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.factorize.lord import Lord
from pare.methods.ops.second_order import square_root
from pare.methods.parts.formula import LowRank
from pare.methods.settings import SettingsError

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, tokens: int = 300) -> Tensor:
    return normal(tokens, width, seed=1) @ normal(width, width, seed=2) * torch.logspace(-1, 1, width)


def split(weight: Tensor, x: Tensor, report: Any = lambda name, value: None, **settings: Any) -> LowRank:
    gram = 2 * x.T @ x / max(len(x), 1)
    method = Lord(**{"multiple_of": 1, "value_dtype": "float32", **settings})
    group = InputGroup("group", {"w": weight}, statistics={"gram": gram})
    (formula,) = method.compress(group, Context(CPU, report=report)).values()
    assert formula.op == "replace"
    (part,) = formula.parts
    assert isinstance(part, LowRank)
    return part


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_what_is_left_is_the_tail_of_the_outputs_and_less_than_svd_leaves(shape: tuple[int, int], ratio: float) -> None:
    weight, x, said = normal(*shape, seed=3), inputs(shape[1]), {}

    part = split(weight, x, said.__setitem__, ratio=ratio)

    rank = part.a.shape[0]
    outputs = x.double() @ weight.double().T
    tail = torch.linalg.svdvals(outputs)[rank:].square().sum()
    left = (outputs - x.double() @ part.materialise().double().T).square().sum()
    assert float(left) == pytest.approx(float(tail), rel=1e-3)
    assert said["lord/output_error"] == pytest.approx(float(tail) * 2 / len(x), rel=1e-3)
    u, s, vt = torch.linalg.svd(weight)
    plain = u[:, :rank] * s[:rank] @ vt[:rank]
    assert left < (outputs - x.double() @ plain.double().T).square().sum()


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_it_has_no_more_numbers_than_it_may_and_orthonormal_columns(shape: tuple[int, int]) -> None:
    for ratio in (0.2, 0.5, 0.99):
        part = split(normal(*shape), inputs(shape[1]), ratio=ratio)
        assert part.a.numel() + part.b.numel() <= ratio * shape[0] * shape[1]
        assert part.a.numel() + part.b.numel() > ratio * shape[0] * shape[1] - sum(shape)
        torch.testing.assert_close(part.b.T @ part.b, torch.eye(part.b.shape[1]), rtol=0, atol=1e-5)


def test_ranks_are_multiples_and_a_weight_that_has_none_is_refused() -> None:
    assert [Lord(ratio=r).rank((576, 576)) for r in (0.1, 0.5, 0.8)] == [16, 144, 224]
    with pytest.raises(SettingsError, match=r"lord.multiple_of must be at most 6, the rank that ratio=0.5 leaves for w"):
        Lord(ratio=0.5).check_shapes({"w": (24, 24)})
    Lord(ratio=0.5, multiple_of=6).check_shapes({"w": (24, 24)})


def test_reading_the_data_again_or_in_another_order_changes_nothing() -> None:
    weight, x = normal(16, 24), inputs(24)
    once = split(weight, x).materialise()

    torch.testing.assert_close(split(weight, torch.cat([x, x])).materialise(), once, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(split(weight, x.flip(0)).materialise(), once, rtol=1e-3, atol=1e-4)


def test_fewer_tokens_than_the_rank_lose_nothing_on_them() -> None:
    for shape in ((16, 24), (24, 16)):
        weight, x = normal(*shape), inputs(shape[1])[:3]
        part = split(weight, x, ratio=0.9)
        assert part.materialise().isfinite().all()
        torch.testing.assert_close(x @ part.materialise().T, x @ weight.T, rtol=1e-3, atol=1e-2)


def test_a_group_that_saw_nothing_is_split_by_plain_svd_and_it_is_said() -> None:
    said: dict[str, float] = {}
    weight = normal(16, 24)

    part = split(weight, torch.zeros(4, 24), said.__setitem__, ratio=0.5)

    u, s, vt = torch.linalg.svd(weight)
    rank = part.a.shape[0]
    torch.testing.assert_close(part.materialise(), u[:, :rank] * s[:rank] @ vt[:rank], rtol=1e-3, atol=1e-4)
    assert said["lord/fallbacks"] == said["lord/fallback/group"] == 1
    with pytest.raises(ValueError, match="lord: group met infinite or NaN inputs"):
        split(weight, torch.full((4, 24), float("inf")))


def test_the_square_root_of_a_gram_matrix_and_its_pseudo_inverse() -> None:
    x = inputs(12)[:5].double()
    gram = x.T @ x

    root, inverse = square_root(gram)

    assert root.shape == (12, 5)
    torch.testing.assert_close(root @ root.T, gram)
    torch.testing.assert_close(inverse @ root, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"ratio": 1.0}, {"multiple_of": 0}, {"value_dtype": "int8"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=rf"lord.{next(iter(settings))} must be"):
        Lord(**settings)
