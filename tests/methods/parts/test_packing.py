import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pare.methods.parts.packing import pack_bytes, pack_trits, pack_words, unpack_bytes, unpack_trits, unpack_words

WIDTHS = range(1, 9)


def some_codes(bits: int, *shape: int) -> torch.Tensor:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))
    return codes.to(torch.uint8 if bits <= 8 else torch.int32)


@given(st.integers(1, 16), st.integers(1, 3), st.integers(1, 100))
def test_words_come_back_as_they_were_and_waste_less_than_one_word_a_row(bits: int, rows: int, n: int) -> None:
    codes = some_codes(bits, rows, n)
    words = pack_words(codes, bits)
    assert torch.equal(unpack_words(words, bits, n), codes)
    assert 0 <= words.shape[1] * 32 - n * bits < 32


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_that_were_packed_down_the_columns_come_back(bits: int) -> None:
    for rows in (1, 3, 40):
        codes = some_codes(bits, 5, rows)
        down = pack_words(codes, bits).T.contiguous()
        assert torch.equal(unpack_words(down.T, bits, rows), codes)


@given(st.sampled_from((1, 2, 4, 8)), st.integers(1, 100))
def test_bytes_come_back_as_they_were_and_waste_less_than_one_byte(bits: int, n: int) -> None:
    codes = some_codes(bits, n)
    packed = pack_bytes(codes, bits)
    assert torch.equal(unpack_bytes(packed, bits, n), codes)
    assert 0 <= len(packed) * 8 - n * bits < 8


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 96, 577])
def test_words_are_those_of_compressed_tensors(bits: int, n: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = some_codes(bits, 5, n)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(pack_words(codes.T, bits).T, pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(pack_words(codes, bits), bits, signed.shape), signed)


@given(st.integers(1, 3), st.integers(1, 30))
def test_five_codes_of_three_values_fill_a_byte(rows: int, n: int) -> None:
    codes = torch.randint(0, 3, (rows, n), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    packed = pack_trits(codes)
    assert torch.equal(unpack_trits(packed, n), codes)
    assert packed.shape == (rows, -(-n // 5))


def test_the_first_of_five_codes_is_the_lowest_digit() -> None:
    assert pack_trits(torch.tensor([[1, 2, 0, 0, 2], [2, 2, 2, 2, 2]])).tolist() == [[1 + 2 * 3 + 2 * 81], [242]]


def test_a_code_of_more_than_a_byte_runs_on_into_the_next() -> None:
    assert pack_words(torch.tensor([0xABC, 0x123, 0xFFF]), 12).tolist() == [0xFF123ABC - 2**32, 0xF]


def test_the_first_code_of_a_byte_lies_in_its_high_half() -> None:
    assert pack_bytes(torch.tensor([0xA, 0x3, 0xF]), 4).tolist() == [0xA3, 0xF0]


def test_widths_and_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one of 1, 2, 4, 8, got 3"):
        pack_bytes(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="got 17"):
        pack_words(torch.zeros(1, 4), 17)
    with pytest.raises(ValueError, match="33 codes of 4 bits fill 5 words, got 4"):
        unpack_words(torch.zeros(1, 4, dtype=torch.int32), 4, 33)
    with pytest.raises(ValueError, match="6 codes of three values fill 2 bytes, got 1"):
        unpack_trits(torch.zeros(1, 1, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="3 codes of 4 bits fill 2 bytes, got 1"):
        unpack_bytes(torch.zeros(1, dtype=torch.uint8), 4, 3)
