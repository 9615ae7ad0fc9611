import pytest
import torch

from pare.methods.parts.codebooks import (
    TABLES,
    Codebook,
    Integer,
    Minifloat,
    PowerOfTwo,
    Table,
    Ternary,
    Vectors,
    dynamic8,
    fp4,
    nf4,
    read_codebook,
)

FLOATS = [Minifloat(e, bits - 1 - e, special) for bits in range(3, 9) for e in range(1, bits) for special in ("none", "nan")]
FLOATS += [Minifloat(e, m, "ieee") for e, m in ((2, 1), (5, 2), (4, 3), (3, 4))]
BOOKS: list[Codebook] = [
    *(Integer(bits, signed) for bits in range(1, 9) for signed in (True, False)),
    *(make() for make in TABLES.values()),
    *FLOATS,
    PowerOfTwo(),
    Table(torch.tensor([0.5, -2.0, 0.1, 7.0])),
]


def all_codes(book: Codebook) -> torch.Tensor:
    """Those that stand for numbers."""
    codes = torch.arange(2**book.bits).to(torch.uint8)
    return codes[book.lookup(codes).isfinite()]


def test_the_fixed_tables_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(nf4().values, functional.get_4bit_type("nf4", device="cpu"))
    theirs = functional.get_4bit_type("fp4", device="cpu").sort(stable=True).values
    torch.testing.assert_close(fp4().values, theirs, rtol=0, atol=1e-7)
    assert torch.equal(dynamic8().values, functional.create_dynamic_map())


def test_normal_float_has_the_published_values() -> None:
    published = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
    torch.testing.assert_close(nf4().values, torch.tensor(published), rtol=0, atol=1.2e-7)
    assert nf4().values[7] == 0


def test_a_fixed_table_does_not_take_on_the_default_dtype_or_device_of_its_first_caller() -> None:
    nf4.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            values = nf4().values
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.dtype == torch.float32
    assert values.device.type == "cpu"
    assert values[-1] == 1


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: str(b.spec()))
def test_every_entry_is_nearest_to_itself_and_the_spec_brings_the_codebook_back(book: Codebook) -> None:
    codes, again = all_codes(book), read_codebook(book.spec(), book.tensors())
    if book.spec().get("name") == "fp4":  # zero stands twice in it
        codes = codes[codes != 8]
    assert torch.equal(book.nearest(book.lookup(codes)), codes)
    assert torch.equal(again.lookup(codes), book.lookup(codes))
    assert again.spec() == book.spec()


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: str(b.spec()))
def test_nearest_is_what_a_search_over_all_entries_finds(book: Codebook) -> None:
    entries = book.lookup(all_codes(book)).double()
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)) * entries.abs().max().clamp(max=1e30).float()
    values = torch.cat([values, values / 1000, torch.tensor([0.0, -0.0, 3e38, -3e38, torch.inf, -torch.inf])])
    found = book.lookup(book.nearest(values)).double()
    assert found.isfinite().all()
    values = values.double().clamp(-1e39, 1e39)
    assert torch.equal((values - found).abs(), (values.unsqueeze(1) - entries).abs().amin(1))


@pytest.mark.parametrize(
    ("book", "dtype"), [(Minifloat(4, 3, "nan"), torch.float8_e4m3fn), (Minifloat(5, 2, "ieee"), torch.float8_e5m2)]
)
def test_eight_bit_floats_have_the_bit_patterns_and_the_rounding_of_torch(book: Minifloat, dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    theirs = codes.view(dtype).float()
    assert torch.equal(book.lookup(codes).nan_to_num(nan=1e9), theirs.nan_to_num(nan=1e9))
    assert book.largest == torch.finfo(dtype).max

    entries = theirs[theirs.isfinite()].sort().values
    halves = (entries[1:] + entries[:-1]) / 2
    values = torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(0)) * book.largest / 4, halves, entries])
    values = values[values.abs() <= book.largest]
    assert torch.equal(book.nearest(values), values.to(dtype).view(torch.uint8))
    assert book.lookup(book.nearest(torch.tensor([1e9, -torch.inf]))).tolist() == [book.largest, -book.largest]


@pytest.mark.parametrize(
    ("exponent", "mantissa", "published"),
    [
        (2, 1, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (3, 0, [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        (1, 2, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        (2, 0, [0, 1, 2, 4]),
        (1, 1, [0, 1, 2, 3]),
    ],
)
def test_four_and_three_bit_floats_have_the_published_values(exponent: int, mantissa: int, published: list[float]) -> None:
    book, half = Minifloat(exponent, mantissa, "none"), len(published)
    assert book.lookup(torch.arange(half)).tolist() == published
    assert book.lookup(torch.arange(half, 2 * half)).tolist() == [-value for value in published]


@pytest.mark.parametrize(
    ("book", "largest", "smallest"),
    [
        (Minifloat(3, 2, "none"), 28, 0.0625),
        (Minifloat(2, 3, "none"), 7.5, 0.125),
        (Minifloat(2, 2, "none"), 7, 0.25),
        (Minifloat(4, 3, "none"), 480, 2**-9),
        (Minifloat(4, 3, "nan"), 448, 2**-9),
        (Minifloat(5, 2, "ieee"), 57344, 2**-16),
    ],
)
def test_floats_reach_as_far_as_published(book: Minifloat, largest: float, smallest: float) -> None:
    assert book.largest == largest
    assert book.lookup(torch.tensor([1])).item() == smallest


def test_six_bit_floats_are_half_precision_floats_with_a_shifted_bias() -> None:
    codes = torch.arange(64)
    half = ((codes >> 5) << 15 | (codes & 31) << 8).to(torch.uint16).view(torch.float16)
    assert torch.equal(Minifloat(3, 2, "none").lookup(codes), half.float() * 4096)


def test_half_way_goes_to_the_even_code() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5])
    found = Minifloat(2, 1, "none").lookup(Minifloat(2, 1, "none").nearest(values))
    assert found.tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -1, -4]
    assert found.signbit().tolist() == [False] * 7 + [True] * 3


def test_powers_of_two_are_the_exponents_of_microscaling() -> None:
    book = PowerOfTwo()
    assert book.lookup(torch.tensor([127, 128, 126, 0, 254])).tolist() == [1, 2, 0.5, 2.0**-127, 2.0**127]
    assert book.lookup(torch.tensor([255])).isnan().all()
    assert book.nearest(torch.tensor([1.0, 2.9, 3.1, 1.4e38, 0.0, -1.0, torch.inf])).tolist() == [127, 128, 129, 254, 0, 0, 254]
    assert torch.equal(book.lookup(torch.arange(255)), torch.arange(255).to(torch.uint8).view(torch.float8_e8m0fnu).float())


def test_a_malformed_minifloat_is_refused() -> None:
    for exponent, mantissa in ((0, 3), (1, 0), (5, 3), (9, -3)):
        with pytest.raises(ValueError, match="3 to 8 bits"):
            Minifloat(exponent, mantissa, "none")
    with pytest.raises(ValueError, match="none, nan or ieee, got 'fn'"):
        Minifloat(4, 3, "fn")


def test_integers_start_where_they_should() -> None:
    assert Integer(3, signed=True).lookup(torch.arange(8)).tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert Integer(3, signed=False).lookup(torch.arange(8)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_learned_table_is_stored_and_a_malformed_one_refused() -> None:
    learned = Table(torch.tensor([-1.0, 0.1, 0.4, 2.0]))
    assert torch.equal(learned.tensors()["values"], learned.values)
    assert torch.equal(read_codebook(learned.spec(), learned.tensors()).lookup(torch.tensor([3, 0])), torch.tensor([2.0, -1.0]))
    with pytest.raises(ValueError, match="got 3"):
        Table(torch.zeros(3))
    with pytest.raises(ValueError, match="of floats, got"):
        Table(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"unknown codebook .* known: integer, minifloat, .* table of nf4, fp4"):
        read_codebook({"kind": "table", "name": "nf5"}, {})


def test_three_values_take_the_nearest_code() -> None:
    assert Ternary().nearest(torch.tensor([-9.0, -0.6, -0.5, 0.2, 0.51, 3])).tolist() == [0, 0, 1, 1, 2, 2]
    assert Ternary().lookup(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]
    assert read_codebook(Ternary().spec(), {}) == Ternary()


def test_each_stretch_of_a_weight_may_have_a_table_of_its_own() -> None:
    tables = Table(torch.tensor([[0.0, 1.0], [10.0, -10.0], [5.0, 6.0], [7.0, 9.0]], dtype=torch.float16))
    weight = torch.tensor([[0.4, 0.6, 9.0, -3.0], [5.6, -1.0, 8.0, 99.0]])  # two groups of two columns in each row
    codes = tables.nearest(weight)
    assert codes.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]
    assert tables.lookup(codes).tolist() == [[0, 1, 10, -10], [6, 5, 7, 9]]


@pytest.mark.parametrize("along", ["row", "column"])
@pytest.mark.parametrize("books", [1, 2])
def test_the_nearest_vector_is_what_a_search_over_all_finds(along: str, books: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values, weight = torch.randn(books, 8, 3, generator=generator), torch.randn(5, 12, generator=generator)
    if along == "column":
        weight = torch.randn(12, 4, generator=generator)
    book = Vectors(values if books > 1 else values[0], along)
    codes = book.nearest(weight)
    assert tuple(codes.shape) == book.code_shape((weight.shape[0], weight.shape[1])) == ((5, 4) if along == "row" else (4, 4))
    cut = weight.view(5, 4, 3) if along == "row" else weight.view(4, 3, 4).transpose(1, 2)
    found = book.lookup(codes)
    found = found.view(5, 4, 3) if along == "row" else found.view(4, 3, 4).transpose(1, 2)
    for column in range(4):
        table = values[column * books // 4]
        distance = (cut[:, column].unsqueeze(1) - table).square().sum(-1)
        torch.testing.assert_close((cut[:, column] - found[:, column]).square().sum(-1), distance.amin(1))


def test_what_lies_over_the_edge_does_not_count_for_the_nearest_vector() -> None:
    book = Vectors(torch.tensor([[0.0, 0.0], [1.0, 100.0]]))
    assert book.nearest(torch.tensor([[0.1, 0.0, 0.9]])).tolist() == [[0, 1]]
    assert Vectors(book.values, "column").nearest(torch.tensor([[0.1], [0.0], [0.9]])).tolist() == [[0], [1]]


def test_a_malformed_codebook_of_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits 1 to 16, got \(3, 2\)"):
        Vectors(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="row or column, got 'diagonal'"):
        Vectors(torch.zeros(4, 2), "diagonal")
