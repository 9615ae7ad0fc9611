import pytest
import torch

from pare.methods.parts.codebooks import TABLES, Codebook, Integer, Table, dynamic8, nf4, read_codebook

BOOKS = [*(Integer(bits, signed) for bits in range(1, 9) for signed in (True, False)), *(make() for make in TABLES.values())]


def test_the_fixed_tables_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(nf4().values, functional.get_4bit_type("nf4", device="cpu"))
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
    codes = torch.arange(2**book.bits).to(torch.uint8)
    assert torch.equal(book.nearest(book.lookup(codes)), codes)
    again = read_codebook(book.spec(), book.tensors())
    assert torch.equal(again.lookup(codes), book.lookup(codes))


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: str(b.spec()))
def test_nearest_is_what_a_search_over_all_entries_finds(book: Codebook) -> None:
    entries = book.lookup(torch.arange(2**book.bits).to(torch.uint8))
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)) * entries.abs().max()
    least = (values.unsqueeze(1) - entries).abs().amin(1)
    assert torch.equal((values - book.lookup(book.nearest(values))).abs(), least)


def test_integers_start_where_they_should() -> None:
    assert Integer(3, signed=True).lookup(torch.arange(8)).tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert Integer(3, signed=False).lookup(torch.arange(8)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_learned_table_is_stored_and_a_malformed_one_refused() -> None:
    learned = Table(torch.tensor([-1.0, 0.1, 0.4, 2.0]))
    assert torch.equal(learned.tensors()["values"], learned.values)
    assert torch.equal(read_codebook(learned.spec(), learned.tensors()).lookup(torch.tensor([3, 0])), torch.tensor([2.0, -1.0]))
    with pytest.raises(ValueError, match="got 3"):
        Table(torch.zeros(3))
    with pytest.raises(ValueError, match="ascending"):
        Table(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"unknown codebook .* known: integer, table of nf4, dynamic8"):
        read_codebook({"kind": "table", "name": "nf5"}, {})
