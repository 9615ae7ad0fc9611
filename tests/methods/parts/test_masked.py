import pytest
import torch

from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.masked import Indexed, Masked, NofM

KEEP = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0, 0, 1]]).bool()
VALUES = torch.arange(1.0, 9.0)
DENSE = [[1, 2, 0, 0, 0, 0, 3, 4], [0, 5, 0, 6, 7, 0, 0, 8]]


def test_each_way_of_saying_which_weights_stay_gives_the_same_weight() -> None:
    for part in (Masked.of(KEEP, VALUES), NofM.of(KEEP, VALUES, 2, 4), Indexed.of(KEEP, VALUES)):
        assert part.materialise().tolist() == DENSE
        assert torch.equal(part.keep(), KEEP)


def test_two_of_four_take_three_bits_for_four_weights() -> None:
    keep = KEEP.repeat(64, 16)
    part = NofM.of(keep, torch.ones(128 * 64).bfloat16(), 2, 4)
    assert part.nbytes == 128 * 128 * 3 // 4 // 8 + 2 * 128 * 64
    assert part.logical_bits == 8 * part.nbytes
    assert Masked.of(keep, part.values).nbytes == 128 * 128 // 8 + 2 * 128 * 64
    assert NofM.of(KEEP, VALUES, 4, 8).index_bits == 2 * 7


def test_choices_are_numbered_in_the_order_of_combinations() -> None:
    part = NofM.of(KEEP, VALUES, 2, 4)
    assert part.choices.tolist() == [[0 + (5 << 3)], [4 + (2 << 3)]]  # of 01 02 03 12 13 23


def test_few_weights_cost_their_columns_and_a_count_for_each_row() -> None:
    keep = torch.zeros(16, 1024, dtype=torch.bool)
    keep[3, 1000] = keep[3, 2] = keep[9, 1023] = True
    part = Indexed.of(keep, torch.tensor([1.0, 2.0, 3.0]))
    assert part.counts.tolist() == [0, 0, 0, 2] + [0] * 5 + [1] + [0] * 6
    assert part.columns.tolist() == [2 + (1000 << 10) + (1023 << 20)]
    assert (part.materialise()[3, 2], part.materialise()[3, 1000], part.materialise()[9, 1023]) == (1, 2, 3)
    assert part.logical_bits == 3 * 10 + 16 * 32 + 3 * 32
    assert part.nbytes < Masked.of(keep, part.values).nbytes


def test_the_values_may_be_codes_and_stay_apart_from_the_index() -> None:
    values = Codes.of(
        torch.tensor([[3, 2, 1, 0], [3, 3, 3, 3]]), Integer(2, True), Rows(2), torch.tensor([[1.0, 10.0], [2, 3]])
    )
    for part in (Masked.of(KEEP, values), NofM.of(KEEP, values, 2, 4), Indexed.of(KEEP, values)):
        assert part.materialise().tolist() == [[1, 0, 0, 0, 0, 0, -10, -20], [0, 2, 0, 2, 3, 0, 0, 3]]
        assert part.logical_bits - part.index_bits == values.logical_bits


def test_what_does_not_fit_is_refused() -> None:
    for make in (Masked.of, Indexed.of, lambda keep, values: NofM.of(keep, values, 2, 4)):
        with pytest.raises(ValueError, match="8 weights stay, and there are values of shape"):
            make(KEEP, VALUES[1:])
    with pytest.raises(ValueError, match="not 4 of every 8 columns"):
        NofM.of(~KEEP.roll(1, 0) | KEEP, torch.ones(int((~KEEP.roll(1, 0) | KEEP).sum())), 4, 8)
    with pytest.raises(ValueError, match="not 1 of every 3 columns"):
        NofM.of(KEEP, VALUES, 1, 3)
    with pytest.raises(ValueError, match="N < M <= 16, got 4:32"):
        NofM.of(KEEP, VALUES, 4, 32)
