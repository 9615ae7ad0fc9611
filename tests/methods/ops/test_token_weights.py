from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pare.methods.ops.statistics import Gram
from pare.methods.ops.token_weights import (
    ActivationNorm,
    Attention,
    AttentionReceived,
    FirstTokens,
    TokenWeights,
    Uniform,
    WeighedGram,
    spread,
)

CPU = torch.device("cpu")
X = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
"""Three sequences of 20 tokens."""


def received() -> Tensor:
    return torch.rand(3, 20, generator=torch.Generator().manual_seed(2))


def not_asked_for() -> Tensor:
    raise AssertionError("the attention costs a pass")


def gram(x: Tensor) -> Tensor:
    statistic = Gram()
    statistic.start(x.shape[-1], CPU)
    statistic.add(x.flatten(0, -2))
    return statistic.finish()


def weighed(x: Tensor, weights: Tensor | None, parts: int = 1) -> Tensor:
    statistic = WeighedGram()
    statistic.start(x.shape[-1], CPU)
    pieces = [None] * parts if weights is None else weights.chunk(parts)
    for chunk, piece in zip(x.chunk(parts), pieces, strict=True):
        statistic.add(chunk.flatten(0, -2), None if piece is None else piece.flatten())
    return statistic.finish()


@dataclass(frozen=True)
class Given(TokenWeights):
    values: tuple[float, ...]

    def importance(self, hidden: Tensor, attention: Attention) -> Tensor:
        return torch.tensor(self.values).expand(hidden.shape[0], -1)


def test_a_weighed_gram_matrix_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    # 2 (3 [1 2; 2 4] + 1 [9 -3; -3 1]) / 4
    torch.testing.assert_close(weighed(x, torch.tensor([[3.0, 1.0]])), torch.tensor([[6.0, 1.5], [1.5, 6.5]]))


def test_it_is_twice_the_weighted_mean_of_outer_products_however_tokens_come() -> None:
    weights = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) + 0.01
    expected = 2 * torch.einsum("st,sti,stj->ij", weights.double(), X.double(), X.double()) / weights.sum()
    torch.testing.assert_close(weighed(X, weights).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighed(X, weights, parts=3), weighed(X, weights), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighed(X, 7 * weights), weighed(X, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_make_it_the_gram_matrix_to_the_bit(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    assert torch.equal(weighed(x, Uniform().of(x, not_asked_for)), gram(x))
    assert torch.equal(weighed(x, None), gram(x))


def test_a_token_of_weight_zero_is_not_there() -> None:
    torch.testing.assert_close(weighed(X, FirstTokens(5).of(X, not_asked_for)), gram(X[:, :5]), rtol=1e-5, atol=1e-6)


def test_tokens_that_count_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="count nothing"):
        weighed(X, torch.zeros(3, 20))
    with pytest.raises(ValueError, match="of no tokens"):
        weighed(X[:0], None)


@pytest.mark.parametrize("how", [Uniform(), FirstTokens(3), ActivationNorm(), AttentionReceived(), Given((0.0, 2.0) * 10)])
def test_weights_come_to_the_length_in_every_sequence_and_have_no_unit(how: TokenWeights) -> None:
    weights = how.of(X, received)
    assert weights.shape == (3, 20)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.full((3,), 20.0))
    torch.testing.assert_close(how.of(4 * X, received), weights)


def test_the_first_tokens_count_and_the_others_do_not_by_hand() -> None:
    assert FirstTokens(2).of(torch.randn(1, 5, 3), not_asked_for).tolist() == [[2.5, 2.5, 0, 0, 0]]
    assert FirstTokens(9).of(torch.randn(1, 5, 3), not_asked_for).tolist() == [[1.0] * 5]


def test_norms_are_spread_between_the_lowest_weight_and_one_by_hand() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    # Norms 5, 1, 3 on the line from 0.2 to 1: 1, 0.2, 0.6, of which the sum is 1.8; equal norms count the same.
    expected = torch.tensor([[5 / 3, 1 / 3, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(ActivationNorm(0.2).of(hidden, not_asked_for), expected)
    assert spread(torch.tensor([[2.0, 2.0]]), 0.1).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("values", [(0.0,) * 20, (float("nan"),) + (1.0,) * 19, (-1.0,) + (2.0,) * 19, (1.0,) * 19])
def test_weights_that_are_none_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"must give each of \(3, 20\) tokens a finite number >= 0"):
        Given(values).of(X, not_asked_for)
