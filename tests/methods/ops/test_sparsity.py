"""Which of some numbers are the smallest, found in three ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pare.methods.ops.sparsity import all_but_smallest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 3, 1000]))
def test_as_many_go_as_are_asked_for_and_of_equal_ones_the_first(seed: int, n: int, rows: int, kinds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, kinds, (2, rows, n), generator=generator).float()
    dropped = int(torch.randint(0, n + 1, (), generator=generator))

    keep = all_but_smallest(score, dropped)

    for row, kept in zip(score.view(-1, n).tolist(), keep.view(-1, n).tolist(), strict=True):
        going = sorted(range(n), key=lambda i: (row[i], i))[:dropped]
        assert kept == [i not in going for i in range(n)]


@pytest.mark.parametrize("n", [4, 8, 9, 100])
def test_infinite_numbers_are_numbers(n: int) -> None:
    score = torch.arange(float(n))
    score[2] = torch.inf
    assert all_but_smallest(score, n - 1).nonzero().flatten().tolist() == [2]
