from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.ops.second_order import inverse_factor
from pare.methods.ops.statistics import Gram
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Formula
from pare.methods.quantize.gptq import Gptq
from pare.methods.quantize.rtn import Rtn
from pare.methods.settings import SettingsError

ORDERS = ("none", "static", "group")
N = 64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixed_inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """512 samples of 64 columns that hang together: 16 common causes and a little noise."""
    return normal(512, 16, seed=1, dtype=dtype) @ normal(16, N, seed=2, dtype=dtype) + 0.3 * normal(512, N, seed=3, dtype=dtype)


def gram_of(x: Tensor) -> Tensor:
    return 2 * x.T @ x / len(x)


def compressed(
    method: Gptq, weights: dict[str, Tensor], gram: Tensor, notes: dict[str, float] | None = None
) -> dict[str, Formula]:
    report = (lambda name, value: None) if notes is None else notes.__setitem__
    return method.compress(
        InputGroup("the.group", weights, statistics={"gram": gram}), Context(torch.device("cpu"), report=report)
    )


def one(method: Gptq, weight: Tensor, gram: Tensor, notes: dict[str, float] | None = None) -> Codes:
    part = compressed(method, {"w": weight}, gram, notes)["w"].parts[0]
    assert isinstance(part, Codes)
    return part


def weighted(error: Tensor, gram: Tensor) -> float:
    return torch.trace(error @ gram @ error.T).item()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "group", "block"), [(2, 16, 64), (3, 64, 20), (4, -1, 1), (8, 24, 128)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_squares_of_the_scaled_errors_add_up_to_the_weighted_error(
    order: str, bits: int, group: int, block: int, symmetric: bool
) -> None:
    """An identity of the algorithm: it fails for nearly any slip of an index."""
    weight, gram = normal(24, N, dtype=torch.float64), gram_of(mixed_inputs(torch.float64))
    method = Gptq(bits=bits, group_size=group, block_size=block, act_order=order, symmetric=symmetric, scale_dtype="float32")
    columns = torch.arange(N) if order == "none" else gram.diagonal().argsort(descending=True)
    damped = gram + method.damping * gram.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    factor, damping = inverse_factor(gram[columns][:, columns], method.damping)
    assert factor is not None
    assert damping == method.damping
    codes, scale, zero, error = method.solve(weight, columns, factor)
    grid = columns.argsort() if order == "group" else torch.arange(N)
    group_of = grid // method.width_of_group(N)
    result = scale.double()[:, group_of] * (codes - zero[:, group_of])
    assert abs(error / weighted(weight - result, damped) - 1) < 1e-10


def test_the_factor_is_the_upper_one_of_the_inverse() -> None:
    gram = gram_of(mixed_inputs(torch.float64))
    factor, _ = inverse_factor(gram, 0.01)
    assert factor is not None
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    torch.testing.assert_close(factor, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("settings", [{}, {"symmetric": False}, {"bits": 3}, {"group_size": 24, "short_last_group": True}])
def test_without_correlations_it_is_rounding_to_nearest_bit_for_bit(order: str, mse: bool, settings: dict[str, Any]) -> None:
    settings = {**settings, "mse": mse}
    if order == "group":  # its groups are of columns in another order, so only whole rows compare
        settings["group_size"] = -1
    weight, gram = normal(24, N), torch.diag(torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.1)
    nearest = Rtn(**settings).round_to_nearest(weight)
    assert torch.equal(one(Gptq(act_order=order, **settings), weight, gram).materialise(), nearest.materialise())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (2, 64), (3, 16), (3, 64), (4, 16), (4, 64)])
def test_on_correlated_inputs_the_output_error_is_less_than_half_of_rounding_to_nearest(
    order: str, symmetric: bool, bits: int, group: int
) -> None:
    weight, gram = normal(96, N), gram_of(mixed_inputs())
    grid: dict[str, Any] = {"bits": bits, "group_size": group, "symmetric": symmetric, "mse": False}
    ours = one(Gptq(act_order=order, **grid), weight, gram).materialise()
    nearest = Rtn(**grid).round_to_nearest(weight).materialise()
    assert weighted(weight - ours, gram) < 0.45 * weighted(weight - nearest, gram)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [-1, 16, 24])
def test_the_block_size_changes_no_code(order: str, group: int) -> None:
    weight, gram = normal(24, N), gram_of(mixed_inputs())
    results = [
        one(Gptq(group_size=group, act_order=order, block_size=size, short_last_group=True), weight, gram).unpacked()
        for size in (1, 7, 16, 128)
    ]
    for other in results[1:]:
        # Sums in another order round otherwise, so a weight half-way between two codes may fall to the other side.
        assert (other != results[0]).float().mean() < 0.003


def test_the_grid_of_a_group_is_fitted_to_weights_that_carry_every_error_before_it() -> None:
    weight, gram = normal(8, N), gram_of(mixed_inputs())
    whole = one(Gptq(group_size=16, act_order="none", block_size=128, scale_dtype="float32", mse=False), weight, gram)
    columnwise = one(Gptq(group_size=16, act_order="none", block_size=1, scale_dtype="float32", mse=False), weight, gram)
    original = Rtn(group_size=16, scale_dtype="float32").round_to_nearest(weight)
    torch.testing.assert_close(whole.scales(), columnwise.scales(), rtol=1e-4, atol=0)
    assert torch.equal(whole.scales()[:, 0], original.scales()[:, 0])
    assert (whole.scales()[:, 1:] - original.scales()[:, 1:]).abs().min() > 0


def test_static_order_keeps_plain_groups_with_the_grids_of_the_original_weights() -> None:
    weight, gram = normal(24, N), gram_of(mixed_inputs())
    part = one(Gptq(group_size=16, act_order="static"), weight, gram)
    assert isinstance(part.index, Rows)
    assert part.index.g_idx is None
    assert torch.equal(part.scales(), Rtn(group_size=16, mse=True).round_to_nearest(weight).scales())
    plain = part.scales().repeat_interleave(16, 1) * (part.unpacked().float() - 8)
    assert torch.equal(part.materialise(), plain)


def test_group_order_stores_an_index_that_undoes_the_order() -> None:
    weight, gram = normal(24, N), gram_of(mixed_inputs())
    order = gram.diagonal().argsort(descending=True, stable=True)
    part = one(Gptq(group_size=16, act_order="group"), weight, gram)
    sorted_first = one(Gptq(group_size=16, act_order="none"), weight[:, order], gram[order][:, order])
    assert isinstance(part.index, Rows)
    assert part.index.g_idx is not None
    assert part.index.g_idx[order].tolist() == [i // 16 for i in range(N)]
    assert torch.equal(part.materialise()[:, order], sorted_first.materialise())


@pytest.mark.parametrize("order", ORDERS)
def test_how_many_tokens_were_counted_changes_nothing(order: str) -> None:
    weight, gram = normal(24, N), gram_of(mixed_inputs())
    results = [one(Gptq(act_order=order, group_size=16), weight, gram * factor).unpacked() for factor in (1, 256, 1 / 1024)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("order", ORDERS)
def test_linears_that_share_their_inputs_get_what_each_would_get_alone(order: str) -> None:
    gram = gram_of(mixed_inputs())
    weights = {"q": normal(32, N), "k": normal(8, N, seed=5), "v": normal(8, N, seed=6)}
    method = Gptq(group_size=16, act_order=order, symmetric=False)
    together = compressed(method, weights, gram)
    assert list(together) == list(weights)
    for name, weight in weights.items():
        alone = one(method, weight, gram).materialise()
        difference = (together[name].materialise() - alone).abs() > 1e-6
        assert difference.float().mean() < 0.003  # sums over other shapes may round otherwise


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_that_are_always_zero_get_zero_weights_and_disturb_nothing(order: str) -> None:
    x, weight = mixed_inputs(), normal(24, N)
    x[:, [3, 40]] = 0
    part = one(Gptq(group_size=16, act_order=order), weight, gram_of(x))
    dense = part.materialise()
    assert (dense[:, [3, 40]] == 0).all()
    assert dense.isfinite().all()
    assert weight[:, 3].abs().min() > 0
    assert (one(Gptq(act_order=order), weight, torch.zeros(N, N)).materialise() == 0).all()


def test_damping_that_is_not_enough_is_doubled_and_that_is_written_down() -> None:
    eigenvalues = torch.linspace(1, 2, N)
    eigenvalues[0] = -0.05  # rounding noise of a larger kind
    basis = torch.linalg.qr(normal(N, N, dtype=torch.float64))[0]
    gram = (basis @ torch.diag(eigenvalues.double()) @ basis.T).float()
    notes: dict[str, float] = {}
    part = one(Gptq(damping=0.01), normal(8, N), gram, notes)
    assert part.materialise().isfinite().all()
    assert notes["gptq/damping/the.group"] == pytest.approx(0.04)
    assert notes["gptq/fallbacks"] == 0


def test_weights_that_cannot_be_solved_for_are_rounded_to_nearest_and_that_is_written_down() -> None:
    gram = torch.eye(N)
    gram[0, 1] = gram[1, 0] = 10
    notes: dict[str, float] = {}
    weight = normal(8, N)
    part = one(Gptq(), weight, gram, notes)
    assert notes == {"gptq/fallbacks": 1.0, "gptq/fallback/the.group": 1.0}
    assert torch.equal(part.materialise(), Rtn(mse=True).round_to_nearest(weight).materialise())
    notes.clear()
    one(Gptq(), weight, gram_of(mixed_inputs()), notes)
    assert set(notes) == {"gptq/fallbacks", "gptq/output_error"}
    assert notes["gptq/fallbacks"] == 0


def test_a_gram_matrix_with_nan_is_refused_by_name() -> None:
    gram = torch.eye(N)
    gram[2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"gptq: the\.group met infinite or NaN inputs"):
        one(Gptq(), normal(8, N), gram)


def test_the_range_search_lowers_the_error_of_heavy_tailed_weights() -> None:
    weight, gram = normal(64, N).pow(3), gram_of(mixed_inputs())
    errors = [weighted(weight - one(Gptq(bits=3, mse=mse), weight, gram).materialise(), gram) for mse in (False, True)]
    assert errors[1] < errors[0]


def test_it_needs_the_gram_matrix_of_the_inputs_it_names() -> None:
    assert Gptq.needs == (Gram,)
    assert Gptq().inputs == "dense"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("bits", 9), ("damping", 0.0), ("act_order", "yes"), ("block_size", 0), ("inputs", "sparse"), ("group_size", 0)],
)
def test_settings_out_of_range_are_refused(setting: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"gptq\.{setting} must be"):
        Gptq(**{setting: value})  # type: ignore[arg-type]
