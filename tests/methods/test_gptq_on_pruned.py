"""Codes for weights of which an earlier stage has left only some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.ops.second_order import inverse_factor
from pare.methods.ops.sparsity import all_but_smallest
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Formula, LowRank
from pare.methods.parts.masked import Masked
from pare.methods.quantize.gptq import Gptq
from pare.methods.quantize.rtn import Rtn

ORDERS = ("none", "static", "group")
N = 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram() -> Tensor:
    x = normal(512, 16, seed=1) @ normal(16, N, seed=2) + 0.3 * normal(512, N, seed=3)
    return 2 * x.T @ x / len(x)


def two_of_four(weight: Tensor) -> Tensor:
    return all_but_smallest(weight.abs().unflatten(1, (-1, 4)), 2).flatten(1)


def ragged(weight: Tensor) -> Tensor:
    return weight.abs() > 0.6


def pruned(weight: Tensor, keep: Tensor) -> InputGroup:
    masked = Masked.of(keep, weight[keep])
    return InputGroup("the.group", {"w": masked.materialise()}, {"w": Formula([masked])}, {"gram": gram()})


def compress(method: Any, group: InputGroup, notes: dict[str, float] | None = None) -> dict[str, Formula]:
    report = (lambda name, value: None) if notes is None else notes.__setitem__
    made: dict[str, Formula] = method.compress(group, Context(torch.device("cpu"), report=report))
    return made


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pattern", [two_of_four, ragged])
@pytest.mark.parametrize("method", [Gptq, Rtn])
def test_what_was_pruned_stays_zero_and_the_rest_is_rounded(method: Any, order: str, symmetric: bool, pattern: Any) -> None:
    weight = normal(24, N)
    keep = pattern(weight)
    own = {"act_order": order} if method is Gptq else {}
    dense = compress(method(bits=4, group_size=16, symmetric=symmetric, **own), pruned(weight, keep))["w"].materialise()

    assert (dense[~keep] == 0).all()
    assert (dense[keep] - weight[keep]).abs().max() < 1.5
    assert (dense[keep] != 0).float().mean() > 0.8


@pytest.mark.parametrize(("group", "symmetric", "scales"), [(16, True, 4), (16, False, 4), (-1, True, 1), (64, True, 1)])
def test_of_two_of_four_only_the_codes_that_stay_are_stored(group: int, symmetric: bool, scales: int) -> None:
    weight = normal(24, N)
    formula = compress(Gptq(bits=4, group_size=group, symmetric=symmetric), pruned(weight, two_of_four(weight)))["w"]
    (part,) = formula.parts
    assert isinstance(part, Masked)
    assert isinstance(part.values, Codes)
    assert part.values.shape == (24, 32)
    zeros = 0 if symmetric else 24 * scales * 4
    assert formula.logical_bits == 24 * (64 * 1 + 32 * 4 + scales * 16) + zeros
    assert formula.nbytes * 8 == formula.logical_bits


@pytest.mark.parametrize("order", ["none", "static"])
def test_where_groups_keep_unlike_numbers_all_codes_are_stored_and_zero_has_one(order: str) -> None:
    weight = normal(24, N)
    keep = ragged(weight)
    (part,) = compress(Gptq(bits=4, group_size=16, act_order=order), pruned(weight, keep))["w"].parts
    assert isinstance(part, Codes)
    assert part.shape == (24, N)
    assert (part.unpacked()[~keep] == 8).all()


def test_a_short_last_group_keeps_its_own_number() -> None:
    weight = normal(8, 40)
    keep = two_of_four(weight)
    method = Rtn(bits=4, group_size=16, short_last_group=True)
    (part,) = compress(method, InputGroup("g", {"w": weight * keep}, {"w": Formula([Masked.of(keep, weight[keep])])}))[
        "w"
    ].parts
    assert isinstance(part, Masked)
    assert isinstance(part.values, Codes)
    assert isinstance(part.values.index, Rows)
    assert part.values.index.group == 8
    assert torch.equal(part.materialise(), method.round_to_nearest(weight * keep).materialise())


def test_it_is_the_algorithm_with_zero_for_a_code() -> None:
    """Column by column in float64, every error made up for at once in all columns to come."""
    weight, keep = normal(24, N), two_of_four(normal(24, N))
    notes: dict[str, float] = {}
    method = Gptq(bits=3, group_size=-1, act_order="static", mse=False, scale_dtype="float32")
    found = compress(method, pruned(weight, keep), notes)["w"].materialise()

    h = gram()
    order = h.diagonal().argsort(descending=True, stable=True)
    factor, _ = inverse_factor(h[order][:, order].double(), 0.01)
    assert factor is not None
    w, scale = (weight * keep).double(), (weight * keep).abs().amax(1).double() / 3.5
    result = torch.zeros_like(w)
    for n, i in enumerate(order.tolist()):
        value = (w[:, i] / scale).round().clamp(-4, 3) * scale * keep[:, i]
        result[:, i] = value
        error = (w[:, i] - value) / factor[n, n]
        w[:, order[n:]] -= error[:, None] * factor[n, n:]
    assert ((found - result).abs() > 1e-4).float().mean() < 0.003
    damped = h.double() + 0.01 * h.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    difference = (weight * keep).double() - found
    assert notes["gptq/output_error"] == pytest.approx(float(torch.trace(difference @ damped @ difference.T)), rel=1e-4)


def test_the_errors_of_zeros_are_made_up_for() -> None:
    weight, keep = normal(96, N), two_of_four(normal(96, N))
    settings: dict[str, Any] = {"bits": 3, "group_size": 16, "mse": False}
    group = pruned(weight, keep)

    def lost(method: Any) -> float:
        error = compress(method, group)["w"].materialise() - group.weights["w"]
        return float(torch.trace(error @ gram() @ error.T))

    assert lost(Gptq(**settings)) < 0.6 * lost(Rtn(**settings))


def test_a_linear_that_was_not_pruned_is_rounded_beside_one_that_was() -> None:
    weight, other = normal(24, N), normal(16, N, seed=5)
    both = pruned(weight, two_of_four(weight))
    both.weights["v"] = other
    made = compress(Gptq(bits=4, group_size=16), both)
    assert isinstance(made["w"].parts[0], Masked)
    alone = compress(Gptq(bits=4, group_size=16), InputGroup("v", {"v": other}, statistics={"gram": gram()}))["v"]
    assert isinstance(made["v"].parts[0], Codes)
    assert ((made["v"].materialise() - alone.materialise()).abs() > 1e-6).float().mean() < 0.003


def test_zeros_that_something_was_added_to_are_weights_like_others() -> None:
    weight = normal(24, N)
    group = pruned(weight, two_of_four(weight))
    added = LowRank(normal(2, N), normal(24, 2))
    group.formulas["w"] = Formula([*group.formulas["w"].parts, added])
    group.weights["w"] = group.formulas["w"].materialise()
    (part,) = compress(Gptq(bits=4, group_size=16), group)["w"].parts
    assert isinstance(part, Codes)
    assert (part.materialise() == 0).float().mean() < 0.3
