"""SparseGPT against the card: a slow version that inverts H for every column, what it may and may not be worse than."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.parts.masked import Kept
from pare.methods.prune.sparsegpt import SparseGpt
from pare.methods.settings import SettingsError

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 400, columns: int = 32, seed: int = 1) -> Tensor:
    """Correlated vectors of features of unlike size."""
    return normal(tokens, columns, seed=seed) @ normal(columns, columns, seed=seed + 1) * torch.logspace(-0.5, 0.5, columns)


def gram_of(x: Tensor) -> Tensor:
    return 2 * x.T @ x / len(x)


def pruned(method: SparseGpt, gram: Tensor, *weights: Tensor, report: Any = lambda name, value: None) -> list[Kept]:
    group = InputGroup("group", {f"w{i}": w for i, w in enumerate(weights)}, statistics={"gram": gram})
    formulas = method.compress(group, Context(CPU, report=report))
    parts = [formula.parts[0] for formula in formulas.values()]
    assert all(isinstance(part, Kept) for part in parts)
    return parts  # type: ignore[return-value]


def slowly(method: SparseGpt, gram: Tensor, weight: Tensor, of: int | None) -> tuple[Tensor, Tensor]:
    """(keep, values) in float64, with the inverse of what is left of H worked out for every column."""
    w, h = weight.double().clone(), gram.double()
    h = h + method.damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    n = len(h)
    keep = torch.ones_like(w, dtype=torch.bool)

    def inverse(i: int) -> Tensor:
        return torch.linalg.inv(h[i:, i:])

    for start in range(0, n, method.block_size):
        stop = min(start + method.block_size, n)
        window = w[:, start:stop].clone()
        if of is None:
            pivots = torch.stack([inverse(i)[0, 0] for i in range(start, stop)])
            cost = window.square() / pivots
            dropped = cost.flatten().sort().indices[: int(cost.numel() * method.sparsity)]
            keep[:, start:stop].reshape(-1)[dropped] = False
            flat = keep[:, start:stop].flatten()
            flat[dropped] = False
            keep[:, start:stop] = flat.view(window.shape)
        for i in range(start, stop):
            if of and i % of == 0:
                pivots = torch.stack([inverse(j)[0, 0] for j in range(i, i + of)])
                cost = w[:, i : i + of].square() / pivots
                for row in range(len(w)):
                    for j in cost[row].sort().indices[: of // 2].tolist():
                        keep[row, i + j] = False
            inv = inverse(i)
            value = torch.where(keep[:, i], w[:, i], 0.0)
            w[:, i:] -= torch.outer((w[:, i] - value) / inv[0, 0], inv[0])
            w[:, i] = value
    return keep, w


def output_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    difference = (weight - new).double()
    return float((difference @ gram.double() * difference).sum())


@pytest.mark.parametrize(("pattern", "of"), [("unstructured", None), ("2:4", 4), ("4:8", 8)])
@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_it_is_what_a_slow_version_makes(pattern: str, of: int | None, block_size: int) -> None:
    method = SparseGpt(pattern=pattern, block_size=block_size, value_dtype="float32")
    weight, gram = normal(6, 32), gram_of(inputs())

    (part,) = pruned(method, gram, weight)

    keep, values = slowly(method, gram, weight, of)
    assert torch.equal(part.keep(), keep)
    torch.testing.assert_close(part.materialise(), values.float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_it_does_better_than_its_mask_alone_and_no_better_than_least_squares(pattern: str) -> None:
    weight, gram = normal(12, 32), gram_of(inputs())

    (part,) = pruned(SparseGpt(pattern=pattern, value_dtype="float32"), gram, weight)

    keep, found = part.keep(), output_error(weight, part.materialise(), gram)
    best = torch.zeros_like(weight).double()
    for row, kept in enumerate(keep):
        h = gram.double()
        best[row, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight[row].double())
    assert output_error(weight, best, gram) < found < 0.95 * output_error(weight, weight * keep, gram)


def test_of_every_aligned_group_exactly_n_stay() -> None:
    for pattern, kept, of in (("2:4", 2, 4), ("4:8", 4, 8)):
        (part,) = pruned(SparseGpt(pattern=pattern), gram_of(inputs()), normal(5, 32))
        assert (part.keep().view(5, -1, of).sum(-1) == kept).all()


def test_every_window_of_every_linear_loses_its_share() -> None:
    parts = pruned(SparseGpt(sparsity=0.3, block_size=8), gram_of(inputs()), normal(10, 32), 5 * normal(20, 32, seed=4))

    for part, rows in zip(parts, (10, 20), strict=True):
        assert (~part.keep()).view(rows, 4, 8).sum((0, 2)).tolist() == [int(0.3 * rows * 8)] * 4


def test_linears_that_read_one_tensor_are_pruned_as_each_alone() -> None:
    gram, weights = gram_of(inputs()), (normal(6, 32), 3 * normal(4, 32, seed=4))

    together = pruned(SparseGpt(), gram, *weights)

    for part, weight in zip(together, weights, strict=True):
        (alone,) = pruned(SparseGpt(), gram, weight)
        assert torch.equal(part.keep(), alone.keep())
        torch.testing.assert_close(part.materialise(), alone.materialise())


def test_where_inputs_are_not_correlated_nothing_is_made_up_for() -> None:
    weight, gram = normal(6, 32), torch.diag(torch.logspace(-1, 1, 32))

    (part,) = pruned(SparseGpt(value_dtype="float32", damping=1e-6), gram, weight)

    score = (weight.square() * gram.diagonal()).flatten()
    keep = torch.ones(6 * 32, dtype=torch.bool)
    keep[score.argsort()[: 6 * 16]] = False
    assert torch.equal(part.keep().flatten(), keep)
    assert torch.equal(part.materialise(), weight * part.keep())


def test_what_rounding_the_values_costs_is_made_up_for_too() -> None:
    weight, gram = normal(16, 32), gram_of(inputs())
    (exact,) = pruned(SparseGpt(value_dtype="float32"), gram, weight)

    (part,) = pruned(SparseGpt(), gram, weight)

    assert isinstance(part.values, Tensor)
    assert part.values.dtype == torch.bfloat16
    rounded_after = exact.materialise().bfloat16().float()
    assert output_error(weight, part.materialise(), gram) < output_error(weight, rounded_after, gram)


def test_features_that_were_never_seen_are_pruned_first() -> None:
    x = inputs()
    x[:, [3, 20]] = 0

    (part,) = pruned(SparseGpt(sparsity=0.1), gram_of(x), normal(8, 32))

    assert not part.keep()[:, [3, 20]].any()


def test_a_gram_matrix_without_a_factor_prunes_without_updates_and_says_so() -> None:
    said: dict[str, float] = {}
    gram = torch.ones(8, 8) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]  # nothing that X^T X can be
    gram.diagonal().fill_(1.0)
    gram[0, 1] = gram[1, 0] = 1e9
    weight = normal(4, 8)

    (part,) = pruned(SparseGpt(value_dtype="float32"), gram, weight, report=said.__setitem__)

    assert said["sparsegpt/fallbacks"] == said["sparsegpt/fallback/group"] == 1.0
    assert torch.equal(part.materialise(), weight * part.keep())
    with pytest.raises(ValueError, match="sparsegpt: group met infinite or NaN inputs"):
        pruned(SparseGpt(), gram * float("nan"), weight)


def test_few_tokens_are_damped_more_and_it_is_said() -> None:
    said: dict[str, float] = {}

    pruned(SparseGpt(damping=1e-10), gram_of(inputs(tokens=3)), normal(4, 32), report=said.__setitem__)

    assert said["sparsegpt/fallbacks"] == 0
    assert said["sparsegpt/damping/group"] > 1e-10


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.0}, r"sparsegpt.sparsity must be in \(0, 1\), got 1.0"),
        ({"block_size": 12}, "sparsegpt.block_size must be a multiple of 8, got 12"),
        ({"pattern": "4:8", "sparsity": 0.4}, "sparsegpt.sparsity must be 0.5 with pattern=4:8, got 0.4"),
        ({"value_dtype": "int8"}, "sparsegpt.value_dtype must be one of bfloat16, float16, float32, got 'int8'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        SparseGpt(**settings)
