"""Weights of which only some are kept. The parts differ in how they say which.

| part | name | what | dtype, shape |
|---|---|---|---|
| all | `values` | the kept weights row by row | any float (kept,) |
| |  | or a part of as many weights, row by row, its operands under `values.` | |
| `Masked` | `mask` | a bit for each weight of the row-major flattened weight (`pack_bytes`) | uint8 (ceil(out * in / 8),) |
| `NofM` | `choices` | for every M columns the number of their choice (`pack_words`) | int32 (out, ceil(in / M * bits / 32)) |
| `Indexed` | `columns` | of each kept weight its column (`pack_words`) | int32 (ceil(kept * bits / 32),) |
| | `counts` | how many of a row are kept | int32 (out,) |

A weight costs 1 bit in a mask; ceil(log2 (M choose N)) / M in `NofM`, 0.75 for 2:4, 0.875 for 4:8; and ceil(log2 in) for a
kept weight in `Indexed`, which is less than a mask where less than about a tenth is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import cache
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.packing import pack_bytes, pack_words, unpack_bytes, unpack_words
from pare.methods.parts.part import Operand, Part, operand_bits, operand_spec, operand_tensors, read_operand


class Kept(Part):
    """What they share."""

    values: Operand

    def keep(self) -> Tensor:
        """Which weights stay, bool (out, in)."""
        raise NotImplementedError

    def materialise(self) -> Tensor:
        values = self.values if isinstance(self.values, Tensor) else self.values.materialise().flatten()
        return torch.zeros(self.shape, device=values.device).masked_scatter_(self.keep(), values.float())

    def nested(self) -> list[Part]:
        return [self.values] if isinstance(self.values, Part) else []

    def with_values(self, values: Operand) -> Kept:
        """The same weights kept, with other values."""
        check_values(self.kind, self.keep(), values)
        again = copy(self)
        again.values = values
        return again

    @property
    def index_bits(self) -> int:
        """Bits that say which weights are kept, without padding."""
        raise NotImplementedError

    @property
    def logical_bits(self) -> int:
        return self.index_bits + operand_bits(self.values)

    def index(self) -> dict[str, Tensor]:
        """The tensors that say which weights are kept."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return self.index() | operand_tensors("values", self.values)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "values": operand_spec(self.values)}


def check_values(kind: str, keep: Tensor, values: Operand) -> None:
    """Raises ValueError where there are not as many values as weights that stay."""
    kept = int(keep.sum())
    is_run = isinstance(values, Part) or values.dim() == 1
    if not is_run or torch.Size(values.shape).numel() != kept:
        raise ValueError(f"{kind}: {kept} weights stay, and there are values of shape {tuple(values.shape)}")


class Masked(Kept):
    """A bit for each weight. Methods make one with `Masked.of`."""

    kind = "masked"

    def __init__(self, shape: tuple[int, int], mask: Tensor, values: Operand) -> None:
        """Operands as they are stored."""
        self.shape, self.mask, self.values = shape, mask, values

    @classmethod
    def of(cls, keep: Tensor, values: Operand) -> Masked:
        """keep (out, in) bool: which weights stay. values: those, row by row, (kept,) or a part of any shape that holds as
        many, (out, kept of a row) where that is the same in all rows.

        Raises:
            ValueError: there are not as many values as weights that stay.
        """
        check_values(cls.kind, keep, values)
        return cls((keep.shape[0], keep.shape[1]), pack_bytes(keep.flatten(), 1), values)

    def keep(self) -> Tensor:
        return unpack_bytes(self.mask, 1, self.shape[0] * self.shape[1]).bool().view(self.shape)

    @property
    def index_bits(self) -> int:
        return self.shape[0] * self.shape[1]

    def index(self) -> dict[str, Tensor]:
        return {"mask": self.mask}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Masked:
        shape = (spec["shape"][0], spec["shape"][1])
        return cls(shape, tensors["mask"], read_operand("values", spec["values"], tensors))


class NofM(Kept):
    """N of every M consecutive columns; a choice of them is numbered in the order of `itertools.combinations`."""

    kind = "n_of_m"

    def __init__(self, shape: tuple[int, int], n: int, m: int, choices: Tensor, values: Operand) -> None:
        """Operands as they are stored."""
        self.shape, self.n, self.m, self.choices, self.values = shape, n, m, choices, values

    @classmethod
    def of(cls, keep: Tensor, values: Operand, n: int, m: int) -> NofM:
        """keep (out, in) bool, true for n of every m columns; values as for `Masked.of`.

        Raises:
            ValueError: it is not, m is above 16, or there are not as many values as weights that stay.
        """
        if not 1 <= n < m <= 16:
            raise ValueError(f"n_of_m: 1 <= N < M <= 16, got {n}:{m}")
        check_values(cls.kind, keep, values)
        if keep.shape[1] % m or not (keep.unflatten(1, (-1, m)).sum(-1) == n).all():
            raise ValueError(f"n_of_m: not {n} of every {m} columns stay in the given {tuple(keep.shape)}")
        powers = 2 ** torch.arange(m, device=keep.device)
        patterns = (keep.unflatten(1, (-1, m)) * powers).sum(-1)
        known = (choices_of(n, m).to(keep.device) * powers).sum(-1)
        order = known.argsort()
        numbers = order[torch.searchsorted(known[order], patterns)]
        return cls((keep.shape[0], keep.shape[1]), n, m, pack_words(numbers, choice_bits(n, m)), values)

    def keep(self) -> Tensor:
        numbers = unpack_words(self.choices, choice_bits(self.n, self.m), self.shape[1] // self.m)
        return choices_of(self.n, self.m).to(numbers.device)[numbers.int()].flatten(1)

    @property
    def index_bits(self) -> int:
        return self.shape[0] * self.shape[1] // self.m * choice_bits(self.n, self.m)

    def index(self) -> dict[str, Tensor]:
        return {"choices": self.choices}

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"n": self.n, "m": self.m}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NofM:
        shape, values = (spec["shape"][0], spec["shape"][1]), read_operand("values", spec["values"], tensors)
        return cls(shape, spec["n"], spec["m"], tensors["choices"], values)


@cache
def choices_of(n: int, m: int) -> Tensor:
    """bool (m choose n, m), on the CPU."""
    chosen = torch.tensor(list(combinations(range(m), n)), device="cpu")
    return torch.zeros(len(chosen), m, dtype=torch.bool, device="cpu").scatter_(1, chosen, True)


def choice_bits(n: int, m: int) -> int:
    return (comb(m, n) - 1).bit_length()


class Indexed(Kept):
    """The columns of the kept weights, for few of them."""

    kind = "indexed"

    def __init__(self, shape: tuple[int, int], columns: Tensor, counts: Tensor, values: Operand) -> None:
        """Operands as they are stored."""
        self.shape, self.columns, self.counts, self.values = shape, columns, counts, values

    @classmethod
    def of(cls, keep: Tensor, values: Operand) -> Indexed:
        """As `Masked.of`; at most 65536 columns."""
        check_values(cls.kind, keep, values)
        columns = pack_words(keep.nonzero()[:, 1], column_bits(keep.shape[1]))
        return cls((keep.shape[0], keep.shape[1]), columns, keep.sum(1).int(), values)

    def keep(self) -> Tensor:
        rows = torch.arange(self.shape[0], device=self.counts.device).repeat_interleave(self.counts)
        keep = torch.zeros(self.shape, dtype=torch.bool, device=self.counts.device)
        keep[rows, unpack_words(self.columns, column_bits(self.shape[1]), len(rows)).int()] = True
        return keep

    @property
    def index_bits(self) -> int:
        return int(self.counts.sum()) * column_bits(self.shape[1]) + 32 * len(self.counts)

    def index(self) -> dict[str, Tensor]:
        return {"columns": self.columns, "counts": self.counts}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Indexed:
        shape, values = (spec["shape"][0], spec["shape"][1]), read_operand("values", spec["values"], tensors)
        return cls(shape, tensors["columns"], tensors["counts"], values)


def column_bits(columns: int) -> int:
    return max(1, (columns - 1).bit_length())
