"""Wanda against the card: which weights go, that the others are untouched, and against which inputs they are weighed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.ops.statistics import Gram, MeanSquare, Statistic
from pare.methods.parts.masked import Kept
from pare.methods.prune.wanda import Wanda
from pare.methods.settings import SettingsError

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value_of(statistic: Statistic, *batches: Tensor) -> Tensor:
    statistic.start(batches[0].shape[1], CPU)
    for batch in batches:
        statistic.add(batch)
    return statistic.finish()


def pruned(method: Wanda, weight: Tensor, *batches: Tensor, report: Any = lambda name, value: None) -> Kept:
    group = InputGroup("group", {"w": weight}, statistics={"mean_square": value_of(MeanSquare(), *batches)})
    (formula,) = method.compress(group, Context(CPU, report=report)).values()
    (part,) = formula.parts
    assert isinstance(part, Kept)
    return part


def kept_slowly(weight: Tensor, x: Tensor, sparsity: float, of: int | None) -> Tensor:
    """The same by hand: weight by weight, with Python's sort."""
    keep = torch.ones_like(weight, dtype=torch.bool)
    width = of or weight.shape[1]
    for i, row in enumerate(weight.tolist()):
        score = [abs(w) * sum(float(v) ** 2 for v in x[:, j]) ** 0.5 for j, w in enumerate(row)]
        for start in range(0, len(row), width):
            ranked = sorted(range(start, start + width), key=lambda j: (score[j], j))
            for j in ranked[: int(width * sparsity)]:
                keep[i, j] = False
    return keep


@pytest.mark.parametrize(("pattern", "of"), [("unstructured", None), ("2:4", 4), ("4:8", 8)])
def test_it_keeps_what_a_slow_version_keeps(pattern: str, of: int | None) -> None:
    weight, x = normal(7, 32), normal(50, 32, seed=1) * torch.logspace(-1, 1, 32)

    assert torch.equal(pruned(Wanda(pattern=pattern), weight, x).keep(), kept_slowly(weight, x, 0.5, of))


@examples(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 60), st.sampled_from([0.1, 0.29, 0.3, 0.5, 0.7, 0.95]), st.integers(0, 999))
def test_every_row_loses_the_same_number_and_what_stays_is_untouched(
    rows: int, columns: int, sparsity: float, seed: int
) -> None:
    weight = normal(rows, columns, seed=seed).bfloat16().float()

    part = pruned(Wanda(sparsity=sparsity), weight, normal(20, columns, seed=seed + 1))

    gone = round(100 * sparsity) * columns // 100
    assert (~part.keep()).sum(1).tolist() == [gone] * rows
    assert torch.equal(part.materialise(), torch.where(part.keep(), weight, 0.0))
    assert isinstance(part.values, Tensor)
    assert part.values.dtype == torch.bfloat16, "the base's numbers cost what they cost there"


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_of_every_aligned_group_exactly_n_stay_at_nine_bits_a_weight(pattern: str, kept: int, of: int) -> None:
    part = pruned(Wanda(pattern=pattern), normal(6, 64).bfloat16().float(), normal(30, 64, seed=1))

    assert (part.keep().view(6, -1, of).sum(-1) == kept).all()
    assert part.nbytes == 6 * 64 * (0.5 * 16 + 1) / 8 == 0.5625 * 6 * 64 * 2


def test_with_equal_inputs_it_is_magnitude_pruning_by_row() -> None:
    weight = normal(5, 40)

    keep = pruned(Wanda(sparsity=0.25), weight, torch.ones(3, 40)).keep()

    assert torch.equal(keep, weight.abs() >= weight.abs().sort(dim=1).values[:, [10]])


def test_a_feature_that_is_huge_is_never_pruned() -> None:
    x = normal(40, 16, seed=1)
    x[:, 5] *= 1e6

    assert pruned(Wanda(sparsity=0.9), normal(8, 16), x).keep()[:, 5].all()


def test_neither_the_batches_nor_how_often_the_data_is_read_matter() -> None:
    weight, x = normal(8, 24), normal(64, 24, seed=1)
    once = pruned(Wanda(), weight, x).keep()

    assert torch.equal(once, pruned(Wanda(), weight, *x.split(8)).keep())
    assert torch.equal(once, pruned(Wanda(), weight, x, x, x).keep())


def test_the_mean_square_is_half_the_diagonal_of_the_gram_matrix() -> None:
    x = normal(64, 24, seed=1)

    torch.testing.assert_close(value_of(MeanSquare(), *x.split(10)), value_of(Gram(), x).diagonal() / 2)
    with pytest.raises(ValueError, match="never called"):
        value_of(MeanSquare(), x[:0])


def test_what_may_be_compared_with_the_row() -> None:
    weight, x = normal(10, 20) * torch.logspace(-1, 1, 10)[:, None], normal(30, 20, seed=1)

    layer, column = (pruned(Wanda(sparsity=0.3, compare=among), weight, x).keep() for among in ("layer", "column"))

    assert (~layer).sum() == 60
    score = weight.abs() * x.square().mean(0).sqrt()
    assert score[layer].min() > score[~layer].max()
    assert (~column).sum(0).tolist() == [3] * 20


def test_inputs_that_were_never_anything_but_zero_fall_back_to_magnitude_and_it_is_said() -> None:
    said: dict[str, float] = {}
    weight = normal(4, 8)

    keep = pruned(Wanda(), weight, torch.zeros(5, 8), report=said.__setitem__).keep()

    assert torch.equal(keep, pruned(Wanda(), weight, torch.ones(5, 8)).keep())
    assert said == {"wanda/fallbacks": 1.0, "wanda/fallback/w": 1.0}
    with pytest.raises(ValueError, match="wanda: w met infinite or NaN inputs"):
        pruned(Wanda(), weight, torch.full((5, 8), float("nan")))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.0}, r"wanda.sparsity must be in \(0, 1\), got 0.0"),
        ({"sparsity": 1.0}, r"wanda.sparsity must be in \(0, 1\), got 1.0"),
        ({"pattern": "1:4"}, "wanda.pattern must be one of unstructured, 2:4, 4:8, got '1:4'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "wanda.sparsity must be 0.5 with pattern=2:4, got 0.6"),
        ({"compare": "block"}, "wanda.compare must be one of row, layer, column, got 'block'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Wanda(**settings)


def test_widths_that_a_pattern_does_not_divide_are_refused_with_the_layer() -> None:
    Wanda().check_shapes({"w": (8, 97)})
    with pytest.raises(SettingsError, match=r"wanda\.pattern must be unstructured for w, which has 98 columns that 4"):
        Wanda(pattern="2:4").check_shapes({"w": (8, 98)})
