"""Documents as rows: what stands where, what is predicted, what is left out."""

from __future__ import annotations

import random

import pytest
import torch

from pare.workers.rows import CUT, NOT_PREDICTED, OPEN_ROWS, Passage, columns_of, fill

FILLING = 999


def document(number: int, length: int) -> Passage:
    """Tokens that say which document they are of, and where in it they stand."""
    ids = [1000 * number + i for i in range(length)]
    return Passage(ids, ids)


def rows_of(packing: str, documents: list[Passage], sequences: int, length: int) -> tuple[dict[str, torch.Tensor], int]:
    rows, left_out = fill(CUT[packing](documents, length), sequences, length, share=packing == "separate")
    return columns_of(rows, length, FILLING, positions=packing == "separate"), len(left_out)


def test_a_document_that_fits_into_a_row_is_never_cut_and_stands_where_it_leaves_the_least_room() -> None:
    documents = [document(1, 5), document(2, 7), document(3, 3), document(4, 5), document(5, 2)]

    columns, left_out = rows_of("separate", documents, 3, 10)

    assert columns["input_ids"].tolist() == [
        [1000, 1001, 1002, 1003, 1004, 4000, 4001, 4002, 4003, 4004],
        [2000, 2001, 2002, 2003, 2004, 2005, 2006, 3000, 3001, 3002],
        [5000, 5001, *[FILLING] * 8],
    ]
    assert columns["position_ids"].tolist() == [[*range(5), *range(5)], [*range(7), *range(3)], [0, 1, *range(8)]]
    assert left_out == 0


@pytest.mark.parametrize("packing", ["separate", "padded"])
def test_neither_what_a_document_begins_with_nor_what_fills_a_row_is_predicted(packing: str) -> None:
    columns, _ = rows_of(packing, [document(1, 5), document(2, 3), document(3, 4)], 2, 8)

    ids, labels = columns["input_ids"], columns["labels"]
    begins = ids % 1000 == 0
    assert torch.equal(labels, ids.masked_fill(begins | (ids == FILLING), NOT_PREDICTED))
    assert begins.sum() == (3 if packing == "separate" else 2)


def test_every_token_of_documents_stands_in_one_row_however_long_they_are() -> None:
    draw = random.Random(0)
    documents = [document(number, draw.choice([2, 3, 9, 16, 17, 40])) for number in range(1, 300)]

    columns, left_out = rows_of("separate", documents, 10_000, 16)

    found = columns["input_ids"][columns["input_ids"] != FILLING].tolist()
    alone = {ids[-1] for ids, _ in documents if len(ids) % 16 == 1}
    assert sorted([*found, *alone]) == sorted(i for ids, _ in documents for i in ids)
    assert left_out == len(alone) > 0, "a token by itself is predicted from nothing"
    assert len(found) / columns["input_ids"].numel() > 0.9
    assert len(columns["input_ids"]) > OPEN_ROWS


def test_a_padded_row_holds_one_document_and_a_long_one_goes_on_in_the_next() -> None:
    columns, _ = rows_of("padded", [document(1, 3), document(2, 6)], 3, 4)

    assert columns.keys() == {"input_ids", "labels"}
    assert columns["input_ids"].tolist() == [
        [1000, 1001, 1002, FILLING],
        [2000, 2001, 2002, 2003],
        [2004, 2005, *[FILLING] * 2],
    ]
    assert columns["labels"].tolist()[2] == [NOT_PREDICTED, 2005, NOT_PREDICTED, NOT_PREDICTED]


@pytest.mark.parametrize("packing", CUT)
def test_passages_that_predict_nothing_are_left_out_and_counted(packing: str) -> None:
    silent = [Passage([7] * 8, [NOT_PREDICTED] * 8), Passage([8] * 8, [8, *[NOT_PREDICTED] * 7])]
    documents = [silent[0], document(1, 8), silent[1], document(2, 8), silent[0], document(3, 8)]

    columns, left_out = rows_of(packing, documents, 2, 8)

    assert columns["input_ids"].tolist() == [list(range(1000, 1008)), list(range(2000, 2008))]
    assert left_out == 2
    assert bool((columns["labels"][:, 1:] >= 0).any(dim=1).all())
