import pytest
import torch

from pare.methods.ops.normal_float import nf4
from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Flat, Rows


def test_a_code_less_its_zero_times_its_scale_is_the_weight() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 3], [3, 2, 1, 0, 1]])
    scale = torch.tensor([[1.0, 10.0, 100.0], [0.5, 2.0, 4.0]])
    zero = torch.tensor([[1, 0, 3], [0, 2, 1]])
    part = Codes.of(codes, Integer(2, signed=False), Rows(2), scale, zero)
    assert part.materialise().tolist() == [[-1, 0, 20, 30, 0], [1.5, 1, -2, -4, 0]]
    signed = Codes.of(codes, Integer(2, signed=True), Rows(2), scale, zero)
    assert torch.equal(signed.materialise(), part.materialise())
    assert torch.equal(part.unpacked(), codes)
    assert torch.equal(part.unpacked_zero(), zero)


def test_a_group_index_says_whose_scale_a_column_takes() -> None:
    codes, scale = torch.full((1, 4), 3), torch.tensor([[1.0, 10.0]])
    part = Codes.of(codes, Integer(2, signed=True), Rows(2, torch.tensor([1, 0, 1, 0], dtype=torch.int32)), scale)
    assert part.materialise().tolist() == [[10, 1, 10, 1]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, -1), (5, 96), (8, 192)])
def test_compressed_tensors_reads_the_operands_by_other_names(bits: int, group: int, symmetric: bool) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator = torch.Generator().manual_seed(bits)
    shape, groups = (40, 192), 1 if group == -1 else 192 // group
    scale = (torch.rand(shape[0], groups, generator=generator) + 0.1).bfloat16()
    zero = None if symmetric else torch.randint(0, 2**bits, (shape[0], groups), generator=generator)
    part = Codes.of(
        torch.randint(0, 2**bits, shape, generator=generator), Integer(bits, signed=symmetric), Rows(group), scale, zero
    )
    state = {"weight_packed": part.codes, "weight_scale": part.scale, "weight_shape": torch.tensor(shape)}
    if part.zero is not None:
        state["weight_zero_point"] = part.zero
    grouping = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **grouping)
    opened = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))
    assert torch.equal(opened["weight"], part.materialise().bfloat16())


@pytest.mark.parametrize("shape", [(96, 64), (33, 10), (192, 576)])
@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_reads_the_operands_by_other_names(shape: tuple[int, int], double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    part = nf4(weight, 64, double)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    assert torch.equal(part.codes, theirs.flatten())
    if double:
        assert torch.equal(part.scale.scale, state.state2.absmax)
        assert torch.equal(part.scale.offset, state.offset)
        # The CPU code of bitsandbytes takes a neighbour of the nearest entry for a few magnitudes in a thousand.
        assert (part.scale.codes.int() - state.absmax.int()).abs().max() <= 2
        assert (part.scale.codes != state.absmax).float().mean() < 0.01
        state.absmax = part.scale.codes
    else:
        assert torch.equal(part.scale, state.absmax)
    assert torch.equal(functional.dequantize_4bit(part.codes.view(-1, 1), state), part.materialise())


def test_normal_float_is_a_search_for_the_nearest_entry_in_each_block() -> None:
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(3))
    part = nf4(weight, 64, double=False)
    for block, absmax, got in zip(weight.flatten().split(64), part.scale, part.materialise().flatten().split(64), strict=True):
        entries = part.codebook.values * block.abs().max()
        assert absmax == block.abs().max()
        assert torch.equal((block - got).abs(), (block.unsqueeze(1) - entries).abs().amin(1))
        assert (block - got).abs().max() <= absmax * 0.1519


def test_the_error_of_normal_float_on_normal_numbers_is_the_published_one() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    for block, published in {32: 0.0076, 64: 0.0085, 128: 0.0091, 256: 0.0097}.items():
        error = (weight - nf4(weight, block, double=False).materialise()).square().mean()
        assert abs(error - published) < 0.0001


def test_zeros_stay_zeros_in_normal_float() -> None:
    assert nf4(torch.zeros(4, 64), double=False).materialise().abs().max() == 0
    assert nf4(torch.zeros(4, 64)).materialise().abs().max() == 0


def test_bits_count_as_published() -> None:
    weight = torch.zeros(128, 2048)
    assert nf4(weight, 64, double=False).logical_bits == 4.5 * weight.numel()
    assert nf4(weight).logical_bits == (4 + 8 / 64 + 32 / (64 * 256)) * weight.numel() + 32
    scale = torch.ones(3, 9, dtype=torch.float16)
    part = Codes.of(torch.zeros(3, 65), Integer(3, True), Rows(8), scale, torch.zeros(3, 9))
    assert part.logical_bits == 3 * 65 * 3 + 16 * 27 + 3 * 27
    assert part.nbytes == 4 * (3 * 7) + 2 * 27 + 4 * 9


def test_scales_and_zeros_of_another_shape_are_refused() -> None:
    codes, book = torch.zeros(4, 10), Integer(4, True)
    with pytest.raises(ValueError, match=r"take scales of shape \(4, 3\), got 8"):
        Codes.of(codes, book, Rows(4), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"take scales of shape \(4, 3\), got 12"):
        Codes.of(codes, book, Rows(4), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"of shape \(4, 3\), got \(4, 1\)"):
        Codes.of(codes, book, Rows(4), torch.ones(4, 3), torch.ones(4, 1))
    with pytest.raises(ValueError, match="groups of rows"):
        Codes.of(codes, book, Flat(4), torch.ones(10), torch.ones(10))
