import pytest
import torch

from pare.methods.ops.gradients import Fisher, GradientMagnitude, GradientStatistic

CPU = torch.device("cpu")
GRADIENTS = [torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[3.0, 4.0, -0.5]])]


def collected(statistic: GradientStatistic, *gradients: torch.Tensor) -> list[list[float]]:
    statistic.start((1, 3), CPU)
    for gradient in gradients:
        statistic.add(gradient)
    found: list[list[float]] = statistic.finish().tolist()
    return found


def test_squares_and_magnitudes_are_taken_of_each_sequence_before_the_mean_by_hand() -> None:
    assert collected(Fisher(), *GRADIENTS) == [[5.0, 10.0, 0.125]]
    assert collected(GradientMagnitude(), *GRADIENTS) == [[2.0, 3.0, 0.25]]
    assert collected(GradientMagnitude(), GRADIENTS[0]) == [[1.0, 2.0, 0.0]]


@pytest.mark.parametrize("need", [Fisher, GradientMagnitude])
def test_no_sequences_are_an_error_not_zeros(need: type[GradientStatistic]) -> None:
    with pytest.raises(ValueError, match="of no sequences"):
        collected(need())
