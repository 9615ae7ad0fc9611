import pytest
import torch

from pare.methods.ops.normal_float import nf4
from pare.methods.parts.codebooks import Integer, Minifloat, PowerOfTwo, Table, Ternary, Vectors, binary, dynamic8, fp4
from pare.methods.parts.codes import Codes, Flat, Rows, Tiles
from pare.methods.parts.formula import Formula, LowRank


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


E2M1 = Minifloat(2, 1, "none")


def test_a_tile_shares_a_scale_and_the_ones_at_the_edges_may_be_short() -> None:
    codes, scale = torch.full((3, 5), 3), torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    part = Codes.of(codes, Integer(2, signed=True), Tiles(2, 2), scale)
    assert part.materialise().tolist() == [[1, 1, 2, 2, 3]] * 2 + [[10, 10, 20, 20, 30]]


def test_an_input_channel_or_the_whole_weight_may_share_a_scale() -> None:
    codes = torch.tensor([[3, 0, 1], [3, 3, 3]])
    by_column = Codes.of(codes, Integer(2, signed=True), Tiles(-1, 1), torch.tensor([[1.0, 10.0, 100.0]]))
    assert by_column.materialise().tolist() == [[1, -20, -100], [1, 10, 100]]
    for index, scale in ((Tiles(-1, -1), torch.tensor([[4.0]])), (Rows(2), torch.tensor(4.0)), (Flat(2), torch.tensor(4.0))):
        part = Codes.of(codes, Integer(2, signed=True), index, scale)
        assert part.materialise().tolist() == [[4, -8, -4], [4, 4, 4]]
        assert tuple(part.scales().shape) == index.scale_shape((2, 3))
        assert part.nbytes == part.codes.nbytes + 4


def test_tiles_take_zero_points() -> None:
    zero = torch.tensor([[1, 2], [0, 3]])
    part = Codes.of(torch.full((3, 4), 2), Integer(2, signed=False), Tiles(2, 2), torch.ones(2, 2), zero)
    assert part.materialise().tolist() == [[1, 1, 0, 0]] * 2 + [[2, 2, -1, -1]]
    assert torch.equal(part.unpacked_zero(), zero)


def test_nvfp4_is_floats_under_float_scales_under_one_global_scale() -> None:
    codes = torch.tensor([[1, 7, 9, 15] * 8])
    inner = Codes.of(torch.tensor([[0x38, 0x7E]]), Minifloat(4, 3, "nan"), Rows(-1), torch.tensor(0.5))  # 1 and 448, halved
    part = Codes.of(codes, E2M1, Rows(16), inner)
    assert part.materialise().tolist() == [[0.25, 3, -0.25, -3] * 4 + [112, 1344, -112, -1344] * 4]
    assert part.nbytes == 16 + 4 + 4  # two scale codes fill half a word
    assert part.logical_bits == 32 * 4 + 2 * 8 + 32


def test_mxfp4_is_floats_under_powers_of_two() -> None:
    exponents = Codes.of(torch.tensor([[130, 120]]), PowerOfTwo(), Rows(-1), torch.tensor(1.0))
    part = Codes.of(torch.tensor([[2, 15] * 32]), E2M1, Rows(32), exponents)
    assert part.materialise().tolist() == [[8, -48] * 16 + [1 / 128, -6 / 128] * 16]


def test_fp4_of_bitsandbytes_takes_scales_that_are_codes_too() -> None:
    inner = Codes.of(
        dynamic8().nearest(torch.tensor([[0.5, -0.25]])), dynamic8(), Flat(256), torch.ones(1), offset=torch.tensor(2.0)
    )
    part = Codes.of(torch.full((2, 64), 15), fp4(), Flat(64), inner)
    assert torch.equal(part.materialise(), inner.materialise().T.expand(2, 64))
    assert part.nbytes == 64 + 2 + 4 + 4


def test_three_values_cost_eight_bits_for_five() -> None:
    codes = torch.tensor([[0, 1, 2, 2, 0, 1, 1], [2, 2, 2, 0, 0, 1, 2]])
    part = Codes.of(codes, Ternary(), Rows(-1), torch.tensor(0.5))
    assert torch.equal(part.materialise(), (codes - 1) * 0.5)
    assert part.codes.nbytes == 4
    assert part.logical_bits == round(14 * 1.6) + 32
    flat = Codes.of(codes, Ternary(), Flat(7), torch.tensor([1.0, 2.0]))
    assert flat.codes.nbytes == 3
    assert torch.equal(flat.materialise(), (codes - 1) * torch.tensor([[1.0], [2.0]]))


def test_binary_bases_are_a_sum_of_signs_with_scales() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    parts, rest, left = [], weight, []
    for _ in range(4):
        alpha = rest.abs().view(6, 2, 16).mean(-1)
        parts.append(Codes.of(binary().nearest(rest), binary(), Rows(16), alpha))
        rest = rest - parts[-1].materialise()
        left.append(rest.square().sum().item())
    torch.testing.assert_close(Formula(parts).materialise(), weight - rest)
    assert left == sorted(left, reverse=True)
    assert parts[0].codes.nbytes == 6 * 4
    by_rank = LowRank(torch.ones(1, 2), torch.arange(1.0, 7).unsqueeze(1))  # a scale for each row, as a product
    assert Codes.of(torch.ones(6, 32), binary(), Rows(16), by_rank).materialise()[:, 31].tolist() == [1, 2, 3, 4, 5, 6]


def test_each_row_may_have_a_table_of_its_own() -> None:
    tables = Table(torch.tensor([[1.0, 2.0], [30.0, 40.0]], dtype=torch.bfloat16))
    part = Codes.of(torch.tensor([[0, 1, 1], [1, 0, 0]]), tables, Rows(-1), torch.tensor(1.0))
    assert part.materialise().tolist() == [[1, 2, 2], [40, 30, 30]]


@pytest.mark.parametrize("bits", [2, 12, 16])
def test_a_code_of_vectors_stands_for_several_weights_and_a_second_sum_of_them_for_what_is_left(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    book, rest = (Vectors(torch.randn(2**bits, 4, generator=generator).half()) for _ in range(2))
    codes, others = (torch.randint(0, 2**bits, (6, 5), generator=generator) for _ in range(2))
    parts = [Codes.of(c, b, Rows(-1), torch.tensor(1.0), shape=(6, 18)) for c, b in ((codes, book), (others, rest))]
    expected = (book.values[codes] + rest.values[others].float()).flatten(1)[:, :18]
    torch.testing.assert_close(Formula(parts).materialise(), expected, rtol=0, atol=1e-6)
    assert parts[0].nbytes == 2**bits * 4 * 2 + 6 * 4 * -(-5 * bits // 32) + 4
    assert parts[0].logical_bits == 2**bits * 4 * 16 + 30 * bits + 32


def test_vectors_may_stand_in_a_column_and_each_column_have_its_scale_and_each_half_its_book() -> None:
    book = Vectors(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]), "column")
    part = Codes.of(
        torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]), book, Tiles(-1, 1), torch.tensor([[1.0, 10, 1, 10]]), shape=(3, 4)
    )
    assert part.materialise().tolist() == [[1, 30, 5, 70], [2, 40, 6, 80], [3, 30, 7, 50]]


def test_what_does_not_go_together_is_refused() -> None:
    scale, zero = torch.ones(4, 1), torch.ones(4, 1)
    for book in (Ternary(), Table(torch.zeros(4, 2))):
        with pytest.raises(ValueError, match="zero points do not go with"):
            Codes.of(torch.zeros(4, 10), book, Rows(-1), scale, zero)
    with pytest.raises(ValueError, match=r"takes a shape \(out, in\), got None"):
        Codes.of(torch.zeros(4, 5), Vectors(torch.zeros(2, 2)), Rows(-1), scale)
    with pytest.raises(ValueError, match=r"takes \(4, 6\) codes"):
        Codes.of(torch.zeros(4, 5), Vectors(torch.zeros(2, 2)), Rows(-1), scale, shape=(4, 11))
