from typing import Any

import pytest
import torch

from pare.methods.ops.precision import full_float32
from pare.methods.ops.statistics import Gram, LargestMagnitude, MeanMagnitude, MeanSquare, Statistic

EVERY = [Gram, LargestMagnitude, MeanMagnitude, MeanSquare]


def collected(need: Any, *chunks: torch.Tensor) -> torch.Tensor:
    statistic: Statistic = need()
    statistic.start(chunks[0].shape[1], torch.device("cpu"))
    for chunk in chunks:
        statistic.add(chunk)
    return statistic.finish()


def gram(*chunks: torch.Tensor) -> torch.Tensor:
    return collected(Gram, *chunks)


def test_the_gram_matrix_is_twice_the_mean_of_outer_products() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert gram(x).tolist() == [[10.0, -1.0], [-1.0, 5.0]]


def test_chunks_of_unequal_size_count_by_their_tokens_and_low_precision_inputs_are_summed_in_float32() -> None:
    x = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = 2 * x.double().T @ x.double() / 1000
    got = gram(x[:7], x[7:500], x[500:])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gram(x), got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [1, 191, 192, 193, 1600])
def test_the_gram_matrix_of_many_features_is_put_together_from_its_upper_half(features: int) -> None:
    x = torch.randn(50, features, generator=torch.Generator().manual_seed(0))
    found = gram(x[:20], x[20:])
    torch.testing.assert_close(found, 2 * x.T @ x / 50, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, found.T)


def test_magnitudes_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0], [-3.0, 0.0]])
    assert collected(MeanMagnitude, x[:1], x[1:]).tolist() == [2.0, 1.0]
    assert collected(LargestMagnitude, x[:1], x[1:]).tolist() == [3.0, 2.0]
    assert collected(MeanSquare, x[:1], x[1:]).tolist() == [5.0, 2.0]


@pytest.mark.parametrize("need", EVERY)
def test_a_statistic_of_divided_inputs_is_what_those_inputs_would_give(need: Any) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    s = torch.randn(16, generator=torch.Generator().manual_seed(4)).exp()
    torch.testing.assert_close(need.of_divided(collected(need, x), s), collected(need, x / s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need", EVERY)
def test_a_group_that_was_never_called_is_an_error_not_a_zero(need: Any) -> None:
    statistic = need()
    statistic.start(4, torch.device("cpu"))
    with pytest.raises(ValueError, match="no tokens"):
        statistic.finish()


def test_full_precision_holds_inside_and_is_taken_back_outside() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
