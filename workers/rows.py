"""Documents as rows of one length for training, and which of their tokens are predicted.

`PACKING` says how documents share rows:
- concatenated: they follow one another, cut where a row ends; a document sees the ones before it in its row.
- separate: several to a row, none sees another. A document that fits into a row is never cut.
- padded: each has rows of its own.
Where rows are not full, end-of-text tokens fill them, which are not predicted and which nothing that is predicted sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PACKING = ("concatenated", "separate", "padded")
PREDICT = ("all", "assistant")
NOT_PREDICTED = -100
OPEN_ROWS = 64
"""Rows in which a document that shares its row looks for room; of more, the fullest is left as it is."""


class Passage(NamedTuple):
    """Consecutive tokens, all of one document unless documents are concatenated."""

    ids: list[int]
    labels: list[int]
    """The same; `NOT_PREDICTED` where a token is none of those to be learnt."""

    @property
    def predicts(self) -> int:
        """Tokens predicted from those before them."""
        return sum(label >= 0 for label in self.labels[1:])


def concatenated(documents: Iterable[Passage], length: int) -> Iterator[Passage]:
    """Windows of the documents one after another; a last one that is not full is left out."""
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        ids += document.ids
        labels += document.labels
        whole = len(ids) - len(ids) % length
        for start in range(0, whole, length):
            yield Passage(ids[start : start + length], labels[start : start + length])
        del ids[:whole], labels[:whole]


def pieces(documents: Iterable[Passage], length: int) -> Iterator[Passage]:
    """Each document for itself, cut where it is longer than a row. What a piece begins with follows from nothing."""
    for ids, labels in documents:
        for start in range(0, len(ids), length):
            yield Passage(ids[start : start + length], [NOT_PREDICTED, *labels[start + 1 : start + length]])


CUT: dict[str, Callable[[Iterable[Passage], int], Iterator[Passage]]] = {
    "concatenated": concatenated,
    "separate": pieces,
    "padded": pieces,
}
"""Packing -> what cuts documents into the passages that rows are filled with."""


def fill(passages: Iterable[Passage], sequences: int, length: int, share: bool) -> tuple[list[list[Passage]], list[Passage]]:
    """(at most `sequences` rows, each of one or more passages; the passages that were left out, for they predict nothing).

    share: whether a row may hold several. A passage then goes into the fullest row that has room for it.
    """
    rows: list[list[Passage]] = []
    rooms: dict[int, int] = {}  # of the open rows, by their numbers
    left_out: list[Passage] = []
    for passage in passages:
        if not passage.predicts:
            left_out.append(passage)
            continue
        n = len(passage.ids)
        fitting = [(room, row) for row, room in rooms.items() if room >= n]
        if fitting:
            room, row = min(fitting)
            rows[row].append(passage)
            rooms[row] = room - n
        elif len(rows) < sequences:
            if share and n < length:
                rooms[len(rows)] = length - n
            rows.append([passage])
        else:
            break
        if len(rooms) > OPEN_ROWS:
            del rooms[min(rooms, key=lambda row: rooms[row])]
        if len(rows) == sequences and not rooms:
            break
    return rows, left_out


def columns_of(rows: Iterable[list[Passage]], length: int, filling: int, positions: bool) -> dict[str, Tensor]:
    """Rows as `TrainMethod.loss` takes them: `input_ids` and `labels`, each (rows, length) int64.

    filling: the token that fills a row up; positions: whether to write `position_ids`, which begin anew with every passage.
    """
    ids, labels, places = [], [], []
    for row in rows:
        empty = length - sum(len(passage.ids) for passage in row)
        ids.append([i for passage in row for i in passage.ids] + [filling] * empty)
        labels.append([label for passage in row for label in passage.labels] + [NOT_PREDICTED] * empty)
        places.append([i for passage in row for i in range(len(passage.ids))] + list(range(empty)))
    columns = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    return columns | ({"position_ids": torch.tensor(places)} if positions else {})
