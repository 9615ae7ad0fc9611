import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pare.methods.parts.activations import ActivationQuantiser
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.methods.parts.linear import FormulaLinear
from pare.methods.parts.transforms import Hadamard

KINDS = {
    "int8": ActivationQuantiser.of("int8"),
    "int8 static": ActivationQuantiser.of("int8", torch.tensor(0.05)),
    "fp8_e4m3": ActivationQuantiser.of("fp8_e4m3"),
    "fp8_e4m3 static": ActivationQuantiser.of("fp8_e4m3", torch.tensor(0.01)),
    "nvfp4": ActivationQuantiser.of("nvfp4", torch.tensor(2.0**-6)),
    "mxfp4": ActivationQuantiser.of("mxfp4"),
    "mxfp8": ActivationQuantiser.of("mxfp8"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_kind
def test_it_keeps_shape_and_dtype_and_zeros_and_errs_as_little_as_its_bits_allow(kind: str) -> None:
    quantise = KINDS[kind]
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(2, 5, 72).to(dtype)
        x[0, 0], x[:, :, 3] = 0, 0
        y = quantise(x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert (y[x == 0] == 0).all()
        error = (y - x).float().square().mean() / x.float().square().mean()
        assert error < (0.03 if "fp4" in kind else 0.002)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])  # its largest number is half a step cut short
def test_rounding_twice_is_rounding_once(kind: str) -> None:
    once = KINDS[kind](normal(7, 64))
    torch.testing.assert_close(KINDS[kind](once), once, rtol=1e-6, atol=0)


@every_kind
def test_it_is_kept_with_its_formula_in_a_file_and_only_parts_that_read_x_are_spared(kind: str, tmp_path: Path) -> None:
    base, repair = Dense(normal(6, 64, seed=1)), LowRank(normal(2, 64, seed=2), normal(6, 2, seed=3))
    formula = Formula([base], right=Hadamard.of(64, 0), activation=KINDS[kind]).plus(Formula([repair], "add"))
    x = normal(5, 64)
    rotated = Hadamard.of(64, 0).apply(x)
    torch.testing.assert_close(formula.apply(x), base.apply(KINDS[kind](rotated)) + repair.apply(x))
    plain = Formula(formula.parts, right=formula.right)
    torch.testing.assert_close(plain.apply(x), x @ formula.materialise().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.materialise(), formula.materialise())
    assert not torch.equal(plain.apply(x), formula.apply(x))

    save_file(formula.tensors(), tmp_path / "w.safetensors")
    again = Formula.from_tensors(json.loads(json.dumps(formula.spec())), load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.apply(x), formula.apply(x))
    assert again.spec() == formula.spec()
    scale = 0 if KINDS[kind].scale is None else 4
    assert formula.nbytes == plain.nbytes + scale
    assert formula.logical_bits == plain.logical_bits + 8 * scale


@every_kind
def test_the_gradient_passes_as_if_nothing_were_rounded(kind: str) -> None:
    x = normal(4, 64).requires_grad_()
    layer = FormulaLinear(Formula([Dense(normal(3, 64, seed=1))], activation=KINDS[kind]))
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.get_parameter("0.weight").sum(0).expand(4, 64))
    expected = KINDS[kind](x.detach()).sum(0).expand(3, 64)
    torch.testing.assert_close(layer.get_parameter("0.weight").grad, expected)
    assert set(dict(layer.named_parameters())) == {"0.weight"}


def test_integers_take_the_scale_of_each_token() -> None:
    x = torch.tensor([[127.5, 10.4, -3.6], [1.275, 0.104, -0.036]])
    assert KINDS["int8"](x)[0].tolist() == [127, 10, -4]
    torch.testing.assert_close(KINDS["int8"](x)[1], torch.tensor([1.27, 0.1, -0.04]))


def test_static_scales_saturate_and_dynamic_ones_follow() -> None:
    x = torch.tensor([[100.0, 1.0]])
    assert KINDS["int8 static"](x)[0, 0].item() == pytest.approx(127 * 0.05)
    assert KINDS["fp8_e4m3 static"](x)[0, 0].item() == pytest.approx(4.48)
    assert KINDS["fp8_e4m3"](x)[0].tolist() == pytest.approx([100, 1], rel=1 / 16)


def test_groups_of_a_token_have_scales_of_their_own() -> None:
    x = torch.cat([torch.full((1, 32), 7.0), torch.full((1, 32), 0.07)], 1)
    assert KINDS["mxfp4"](x)[0, [0, 32]].tolist() == [8, 0.0625]
    nvfp4 = ActivationQuantiser.of("nvfp4", torch.tensor(1 / 64))(x)
    assert nvfp4[0, [0, 32]].tolist() == [6.75, 0.0703125]


def test_the_rounding_of_tokens_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = normal(16, 96)
    for kind, given in (("int8", {"num_bits": 8, "type": "int"}), ("fp8_e4m3", {"num_bits": 8, "type": "float"})):
        args = QuantizationArgs(symmetric=True, strategy="token", dynamic=True, **given)
        scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
        torch.testing.assert_close(KINDS[kind](x), fake_quantize(x, scale, zero, args), rtol=1e-6, atol=1e-7)


@every_kind
def test_a_number_that_is_none_stays_visible(kind: str) -> None:
    x = normal(2, 32)
    x[0, 5] = torch.nan
    assert KINDS[kind](x)[0, 5].isnan()
    assert KINDS[kind](x)[1].isfinite().all()


def test_malformed_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation quantiser 'int3'; known: int8"):
        ActivationQuantiser.of("int3")
    with pytest.raises(ValueError, match="nvfp4 needs a scale"):
        ActivationQuantiser.of("nvfp4")
    with pytest.raises(ValueError, match="mxfp4 takes no scale"):
        ActivationQuantiser.of("mxfp4", torch.tensor(1.0))
    with pytest.raises(ValueError, match="one float32 > 0"):
        ActivationQuantiser.of("int8", torch.tensor([1.0]))
