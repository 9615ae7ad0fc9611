from __future__ import annotations

import itertools
from math import ceil
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.parts.codes import Codes
from pare.methods.parts.formula import Formula
from pare.methods.quantize.rtn import Rtn
from pare.methods.settings import SettingsError

CONTEXT = Context(torch.device("cpu"))
GRIDS = [
    {"symmetric": symmetric, "sym_range": sym_range, "mse": mse}
    for symmetric, sym_range, mse in itertools.product((True, False), ("full", "narrow"), (False, True))
    if symmetric or sym_range == "full"
]
over_grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "-".join(f"{k}={v}" for k, v in g.items()))


def rounded(weight: Tensor, method: Rtn) -> Codes:
    (formula,) = method.compress(InputGroup("group", {"w": weight}), CONTEXT).values()
    (part,) = formula.parts
    assert isinstance(part, Codes)
    return part


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_weight(part: Codes) -> Tensor:
    """The scale of every weight, (out, in)."""
    return part.index.spread(part.scales(), part.shape)


@over_grids
def test_zero_stays_exactly_zero_and_a_group_of_zeros_makes_no_nan(grid: dict) -> None:
    weight = normal(6, 64)
    weight[:, 7] = 0
    weight[2] = 0
    dense = rounded(weight, Rtn(group_size=16, **grid)).materialise()
    assert (dense[weight == 0] == 0).all()
    assert dense.isfinite().all()


@over_grids
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_what_was_rounded_on_the_same_grid_changes_nothing(grid: dict, bits: int) -> None:
    method = Rtn(bits=bits, group_size=32, **grid)
    part = rounded(normal(8, 128), method)
    groups, scale = method.split(part.materialise()), part.scales().unsqueeze(-1)
    zero = part.unpacked_zero()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero.unsqueeze(-1).float()
    assert torch.equal(method.encode(groups, scale, zero).flatten(1), part.unpacked().float())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(2, 8),
    st.sampled_from([-1, 8, 32]),
    st.sampled_from(GRIDS[::2]),
    st.integers(0, 999),
)
def test_no_weight_inside_the_range_is_off_by_more_than_half_a_step(
    out: int, width: int, bits: int, group: int, grid: dict, seed: int
) -> None:
    weight = normal(out, width, seed=seed)
    method = Rtn(bits=bits, group_size=group, short_last_group=True, **grid)
    part = rounded(weight, method)
    codes, step = part.unpacked(), per_weight(part)
    inside = (codes > method.bottom) & (codes < method.top)
    assert ((weight - part.materialise()).abs() <= step / 2 * (1 + 1e-5))[inside].all()
    assert (codes >= method.bottom).all()
    assert (codes <= method.top).all()


@over_grids
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_weights_times_a_power_of_two_give_results_times_that_power(grid: dict, scale_dtype: str) -> None:
    method, weight = Rtn(group_size=32, scale_dtype=scale_dtype, **grid), normal(8, 64)
    for power in (-3, 5):
        assert torch.equal(
            rounded(weight * 2.0**power, method).materialise(), rounded(weight, method).materialise() * 2.0**power
        )


@over_grids
def test_rows_in_another_order_give_results_in_that_order(grid: dict) -> None:
    method, weight, order = Rtn(group_size=32, **grid), normal(9, 64), torch.randperm(9)
    assert torch.equal(rounded(weight[order], method).materialise(), rounded(weight, method).materialise()[order])


@pytest.mark.parametrize("grid", [g for g in GRIDS if g["mse"]])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_range_search_never_makes_a_group_worse(grid: dict, bits: int) -> None:
    weight = normal(40, 256).pow(3)

    def error(mse: bool) -> Tensor:
        method = Rtn(bits=bits, group_size=64, **{**grid, "mse": mse})
        return method.split((weight - rounded(weight, method).materialise()).abs().pow(2.4)).sum(-1)

    searched, plain = error(True), error(False)
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < plain.sum()


@pytest.mark.parametrize("grid", [g for g in GRIDS if g["mse"]])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("tails", [1, 3, 5])
def test_the_range_search_finds_the_best_hundredth_down_to_above_a_fifth(grid: dict, bits: int, tails: int) -> None:
    method, weight = Rtn(bits=bits, group_size=32, scale_dtype="float32", **grid), normal(40, 128).pow(tails)
    weight[3] = 0
    groups = method.split(weight).flatten(0, 1)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    tried = [method.scale_and_zero(p / 100 * low, p / 100 * high) for p in range(100, 20, -2)]
    least = torch.stack([method.error(groups, *each) for each in tried]).amin(0)
    torch.testing.assert_close(method.error(groups, *method.fit(groups)), least, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group", "width"), [(3, 32, 96), (4, -1, 70), (5, 16, 40), (8, 64, 100)])
def test_the_file_has_the_bytes_of_the_formula_and_opens_to_the_same_weights(
    bits: int, group: int, width: int, symmetric: bool, tmp_path: Path
) -> None:
    method, out = Rtn(bits=bits, group_size=group, symmetric=symmetric, short_last_group=True), 24
    formula = Formula([rounded(normal(out, width), method)])
    save_file(formula.tensors(), tmp_path / "w.safetensors")
    again = Formula.from_tensors(formula.spec(), load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.materialise(), formula.materialise())
    groups = 1 if group == -1 else ceil(width / group)
    zero_bytes = 0 if symmetric else 4 * groups * ceil(out * bits / 32)
    assert formula.nbytes == 4 * out * ceil(width * bits / 32) + 2 * out * groups + zero_bytes
    assert formula.logical_bits == round(method.bits_per_weight(width) * out * width)


def test_errors_on_normal_numbers_stand_in_the_known_order() -> None:
    weight = normal(2000, 128)

    def error(**grid: object) -> float:
        part = rounded(weight, Rtn(bits=4, group_size=128, scale_dtype="float32", **grid))  # type: ignore[arg-type]
        return (weight - part.materialise()).square().mean().item()

    assert abs(error(symmetric=False) - 0.0101) < 0.0002
    assert abs(error() - 0.0122) < 0.0002
    assert abs(error(sym_range="narrow") - 0.0138) < 0.0002


def test_the_stored_scale_is_the_one_that_codes_were_made_with() -> None:
    weight = normal(50, 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        part = rounded(weight, Rtn(group_size=64, scale_dtype=str(dtype).removeprefix("torch.")))
        assert isinstance(part.scale, Tensor)
        assert part.scale.dtype == dtype
        expected = (weight / part.scale.float()).round().clamp(-8, 7) + 8
        assert torch.equal(part.unpacked().float(), expected)


def test_the_conventions_of_the_two_symmetric_ranges() -> None:
    weight = torch.tensor([[-3.0, 1.0, 0.5, 3.0]])
    full = rounded(weight, Rtn(bits=2, group_size=-1, scale_dtype="float32"))
    narrow = rounded(weight, Rtn(bits=2, group_size=-1, sym_range="narrow", scale_dtype="float32"))
    assert full.scales().item() == 2
    assert full.materialise().tolist() == [[-4, 0, 0, 2]]
    assert narrow.scales().item() == 3
    assert narrow.materialise().tolist() == [[-3, 0, 0, 3]]


def test_the_scale_of_compressed_tensors_is_the_one_of_the_full_range() -> None:
    groups = normal(16, 4, 32)
    for bits, symmetric in itertools.product((3, 4, 8), (True, False)):
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=32, strategy="group", zp_dtype="torch.int8")
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        ours, our_zero = Rtn(bits=bits, symmetric=symmetric, scale_dtype="float32").fit(groups)
        torch.testing.assert_close(ours, scale, rtol=1e-6, atol=0)
        assert torch.equal(our_zero - 2 ** (bits - 1), zero.float())


def test_a_scale_that_its_dtype_cannot_hold_is_brought_to_the_nearest_number_it_can() -> None:
    for size in (1e-9, 1e7):
        part = rounded(normal(4, 32) * size, Rtn(group_size=32, scale_dtype="float16"))
        assert part.materialise().isfinite().all()
        assert (part.scales() > 0).all()


def test_a_short_last_group_is_rounded_as_if_it_stood_alone() -> None:
    weight = normal(5, 70)
    for symmetric in (True, False):
        method = Rtn(group_size=32, symmetric=symmetric, short_last_group=True)
        alone = rounded(weight[:, 64:], Rtn(group_size=-1, symmetric=symmetric)).materialise()
        assert torch.equal(rounded(weight, method).materialise()[:, 64:], alone)


def test_a_group_size_that_does_not_divide_is_refused_with_the_layer_and_what_would_do() -> None:
    widths = {"a.weight": (8, 64), "b.weight": (8, 96)}
    Rtn(group_size=32).check_shapes(widths)
    Rtn(group_size=-1).check_shapes(widths)
    Rtn(group_size=64, short_last_group=True).check_shapes(widths)
    with pytest.raises(SettingsError) as caught:
        Rtn(group_size=64).check_shapes(widths)
    message = "rtn.group_size must be -1 or a divisor of 96, the input width of b.weight (such as 16, 24, 32, 48, 96), "
    assert str(caught.value) == message + "unless short_last_group=true, got 64"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("bits", 1), ("bits", 9), ("group_size", 0), ("group_size", -2), ("sym_range", "wide"), ("scale_dtype", "int8")],
)
def test_settings_out_of_range_are_refused(setting: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"rtn\.{setting} must be"):
        Rtn(**{setting: value})  # type: ignore[arg-type]
