from __future__ import annotations

from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pare.methods.contract import Context, InputGroup
from pare.methods.ops.float_grids import FORMATS
from pare.methods.parts.codebooks import Minifloat, PowerOfTwo
from pare.methods.parts.codes import Codes
from pare.methods.parts.formula import Formula
from pare.methods.quantize.rtn_float import RtnFloat
from pare.methods.settings import SettingsError

CONTEXT = Context(torch.device("cpu"))
over_formats = pytest.mark.parametrize("name", FORMATS)
PLAIN = [name for name, found in FORMATS.items() if found.scales == "plain" and found.book is not None]
EIGHT_BIT_SCALES = [name for name, found in FORMATS.items() if found.scales != "plain"]


def rounded(weight: Tensor, method: RtnFloat) -> Codes:
    (formula,) = method.compress(InputGroup("group", {"w": weight}), CONTEXT).values()
    (part,) = formula.parts
    assert isinstance(part, Codes)
    return part


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_weight(part: Codes) -> Tensor:
    """The scale of every weight, (out, in)."""
    return part.index.spread(part.scales(), part.shape)


def entries(part: Codes) -> Tensor:
    values = part.codebook.lookup(torch.arange(2 ** int(part.codebook.bits)))
    return values[values.isfinite()]


@over_formats
def test_zero_stays_zero_and_a_group_of_zeros_makes_no_nan(name: str) -> None:
    weight = normal(6, 64)
    weight[:, 7] = 0
    weight[2] = 0
    for given_weight in (weight, torch.zeros(4, 64)):
        dense = rounded(given_weight, RtnFloat(name)).materialise()
        assert (dense[given_weight == 0] == 0).all()
        assert dense.isfinite().all()


@over_formats
def test_every_weight_goes_to_the_nearest_number_under_the_scale_as_it_is_stored(name: str) -> None:
    weight = normal(8, 128).pow(3)
    part = rounded(weight, RtnFloat(name))
    grid = per_weight(part).unsqueeze(-1) * entries(part)
    least = (weight.unsqueeze(-1) - grid).abs().amin(-1)
    torch.testing.assert_close((weight - part.materialise()).abs(), least, rtol=1e-5, atol=1e-7)


@over_formats
def test_rounding_what_was_rounded_changes_nothing(name: str) -> None:
    part = rounded(normal(8, 128), RtnFloat(name))
    again = part.codebook.nearest(part.materialise() / per_weight(part))
    assert torch.equal(part.codebook.lookup(again), part.codebook.lookup(part.unpacked()))


@over_formats
def test_weights_times_a_power_of_two_give_results_times_that_power(name: str) -> None:
    weight = normal(8, 64)
    for power in (-3, 5):
        scaled = rounded(weight * 2.0**power, RtnFloat(name)).materialise()
        assert torch.equal(scaled, rounded(weight, RtnFloat(name)).materialise() * 2.0**power)


@over_formats
def test_rows_in_another_order_give_results_in_that_order(name: str) -> None:
    weight, order = normal(9, 64), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        rounded(weight[order], RtnFloat(name)).materialise(), rounded(weight, RtnFloat(name)).materialise()[order]
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(PLAIN), st.sampled_from([-1, 8, 32]), st.integers(0, 999))
def test_no_weight_is_off_by_more_than_half_the_widest_step(out: int, width: int, name: str, group: int, seed: int) -> None:
    weight = normal(out, width, seed=seed)
    part = rounded(weight, RtnFloat(name, group, scale_dtype="float32", short_last_group=True))
    widest = entries(part).sort().values.diff().max()
    assert ((weight - part.materialise()).abs() <= per_weight(part) * widest / 2 * (1 + 1e-5)).all()


@over_formats
@pytest.mark.parametrize("width", [64, 96])
def test_the_file_has_the_bytes_of_the_formula_and_opens_to_the_same_weights(name: str, width: int, tmp_path: Path) -> None:
    method, out = RtnFloat(name, short_last_group=True), 24
    formula = Formula([rounded(normal(out, width), method)])
    save_file(formula.tensors(), tmp_path / "w.safetensors")
    again = Formula.from_tensors(formula.spec(), load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.materialise(), formula.materialise())

    if name == "nf4":
        assert formula.nbytes == out * width // 2 + 4 * out * width // 64
        return
    book, _, scales = FORMATS[name]
    assert book is not None
    groups = 1 if method.group == -1 else ceil(width / method.group)
    stored = {"plain": 2 * out * groups, "global": 4 * out * ceil(groups / 4) + 4, "power": 4 * out * ceil(groups / 4) + 4}
    assert formula.nbytes == 4 * out * ceil(width * book.bits / 32) + stored[scales]
    logical = {"plain": 16 * out * groups, "global": 8 * out * groups + 32, "power": 8 * out * groups + 32}
    assert formula.logical_bits == out * width * book.bits + logical[scales]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_stored_scale_is_the_one_that_codes_were_made_with(name: str, dtype: str) -> None:
    weight = normal(50, 64)
    part, book = rounded(weight, RtnFloat(name, -1, scale_dtype=dtype)), FORMATS[name].book
    assert book is not None
    assert isinstance(part.scale, Tensor)
    assert part.scale.dtype == getattr(torch, dtype)
    assert torch.equal(part.scale, (weight.abs().amax(1, keepdim=True) / book.largest).to(part.scale.dtype))
    assert torch.equal(part.unpacked(), book.nearest(weight / part.scale.float()))


def test_the_scales_of_nvfp4_are_floats_under_a_power_of_two_that_lets_none_saturate() -> None:
    for size in (1e-6, 1.0, 3e4):
        weight = normal(16, 64) * size
        part = rounded(weight, RtnFloat("nvfp4"))
        inner, wanted = part.scale, weight.view(16, 4, 16).abs().amax(-1) / 6
        assert isinstance(inner, Codes)
        assert inner.codebook == Minifloat(4, 3, "nan")
        assert isinstance(inner.scale, Tensor)
        assert torch.frexp(inner.scale).mantissa == 0.5
        assert inner.scale / 2 <= wanted.max() / 448 < inner.scale
        torch.testing.assert_close(part.scales(), wanted, rtol=1 / 16, atol=0)


def test_a_group_too_small_for_its_scale_takes_the_smallest_one() -> None:
    weight = normal(2, 32)
    weight[0, :16], weight[1, 16:] = 0, weight[1, 16:] * 1e-7
    scales = rounded(weight, RtnFloat("nvfp4")).scales()
    smallest = 2.0**-9 * 2.0 ** int(torch.frexp(weight.abs().max() / 6 / 448).exponent)
    assert (scales[0, 0].item(), scales[1, 1].item()) == (smallest, smallest)


def test_the_scales_of_microscaling_are_powers_of_two_and_lose_at_most_half_a_step_at_the_top() -> None:
    weight = torch.zeros(4, 32)
    weight[:, 0] = torch.tensor([6.0, 6.99, 7.0, 0.75])
    part = rounded(weight, RtnFloat("mxfp4"))
    assert isinstance(part.scale, Codes)
    assert part.scale.codebook == PowerOfTwo()
    assert part.scales().flatten().tolist() == [1, 1, 2, 0.125]
    assert part.materialise()[:, 0].tolist() == [6, 6, 8, 0.75]
    assert rounded(torch.tensor([[464.0], [463.0]]), RtnFloat("mxfp8", short_last_group=True)).scales().tolist() == [[2], [1]]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_the_error_is_no_larger_than_that_of_compressed_tensors(name: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight, group = normal(64, 256), FORMATS[name].group
    cut = weight.view(64, -1, group)
    kind = (
        {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}
        if name == "nvfp4"
        else {"strategy": "group", "scale_dtype": torch.uint8}
    )
    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, group_size=group, zp_dtype=torch.float8_e4m3fn, **kind)
    overall = generate_gparam(weight.min().view(1), weight.max().view(1)) if name == "nvfp4" else None
    scale, zero = calculate_qparams(cut.amin(-1), cut.amax(-1), args, overall)
    theirs = (fake_quantize(weight, scale, zero, args, global_scale=overall) - weight).square().mean()
    ours = (rounded(weight, RtnFloat(name)).materialise() - weight).square().mean()
    assert ours <= theirs * 1.01


def test_errors_on_normal_numbers_stand_in_the_known_order() -> None:
    weight = normal(1000, 256)

    def error(name: str, group: int = 0) -> float:
        part = rounded(weight, RtnFloat(name, group, scale_dtype="float32"))
        return (weight - part.materialise()).square().mean().item()

    assert abs(error("nf4", 64) - 0.0085) < 0.0001
    assert error("fp8_e4m3") < error("fp8_e5m2") < error("fp6_e3m2") < error("nvfp4") < error("mxfp4") < error("fp3_e2m0")
    assert error("fp6_e2m3") < error("fp6_e3m2")
    assert error("fp4_e2m1", 16) < error("fp4_e2m1", 128)
    assert error("mxfp8") < error("fp6_e3m2")


def test_double_quantisation_is_that_of_qlora() -> None:
    part = rounded(normal(128, 256), RtnFloat("nf4", double_quant=True))
    assert isinstance(part.scale, Codes)
    assert part.logical_bits == 128 * 256 * 4 + 512 * 8 + 2 * 32 + 32


def test_a_scale_that_its_dtype_cannot_hold_is_brought_to_the_nearest_number_it_can() -> None:
    for size in (1e-12, 1e8):
        part = rounded(normal(4, 32) * size, RtnFloat("fp8_e4m3", scale_dtype="float16"))
        assert part.materialise().isfinite().all()
        assert (part.scales() > 0).all()


@pytest.mark.parametrize("name", [*PLAIN, *EIGHT_BIT_SCALES])
def test_a_short_last_group_is_rounded_as_if_it_stood_alone(name: str) -> None:
    weight = normal(5, 70)
    group = 0 if name in EIGHT_BIT_SCALES else 32
    method = RtnFloat(name, group, short_last_group=True)
    alone = rounded(weight[:, 64:].clone(), method if group == 0 else RtnFloat(name, -1)).materialise()
    torch.testing.assert_close(rounded(weight, method).materialise()[:, 64:], alone)


def test_a_group_that_does_not_divide_is_refused_with_the_layer() -> None:
    widths = {"a.weight": (8, 64), "b.weight": (8, 72)}
    for method in (RtnFloat("fp8_e4m3"), RtnFloat("nf4"), RtnFloat("mxfp4", short_last_group=True), RtnFloat("fp4_e2m1", 8)):
        method.check_shapes(widths)
    with pytest.raises(SettingsError, match=r"rtn_float.format must be one with groups that divide 72, .* b.weight, which 16"):
        RtnFloat().check_shapes(widths)
    with pytest.raises(SettingsError, match=r"rtn_float.group_size must be one .* b.weight, which 64 .*, got 64"):
        RtnFloat("fp4_e2m1", 64).check_shapes(widths)


@pytest.mark.parametrize(
    "given_settings",
    [
        {"format": "fp5"},
        {"group_size": -2},
        {"group_size": 32},
        {"format": "mxfp4", "group_size": 64},
        {"format": "nf4", "group_size": -1},
        {"scale_dtype": "int8"},
        {"double_quant": True},
    ],
)
def test_settings_that_do_not_go_together_are_refused(given_settings: dict) -> None:
    with pytest.raises(SettingsError, match=rf"rtn_float\.{list(given_settings)[-1]} must be"):
        RtnFloat(**given_settings)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_the_bits_of_a_weight_are_known_beforehand(format: str, double_quant: bool) -> None:
    if double_quant and format != "nf4":
        return
    method = RtnFloat(format=format, double_quant=double_quant)
    formula = method.round_to_nearest(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)))
    # Beside that one number for the whole weight at most, and NF4's offset.
    assert 0 <= formula.logical_bits - 256 * 128 * method.bits_per_weight(128) <= 64
