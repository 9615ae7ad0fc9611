"""Which weights share a scale, and how their codes lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor

from pare.methods.parts.codebooks import TERNARY_BITS
from pare.methods.parts.packing import pack_bytes, pack_trits, pack_words, unpack_bytes, unpack_trits, unpack_words


class AlongRows:
    """Codes packed row by row; every row starts on a new word."""

    def pack(self, codes: Tensor, bits: float) -> Tensor:
        return pack_trits(codes) if bits == TERNARY_BITS else pack_words(codes, int(bits))

    def unpack(self, packed: Tensor, bits: float, shape: tuple[int, int]) -> Tensor:
        return unpack_trits(packed, shape[1]) if bits == TERNARY_BITS else unpack_words(packed, int(bits), shape[1])


@dataclass(frozen=True, eq=False)
class Rows(AlongRows):
    """Groups of `group` consecutive columns of one row (-1: the whole row); the last group of a row may be short."""

    group: int = -1
    g_idx: Tensor | None = None
    """(in,) int32, the group of each column, where groups are not of consecutive columns."""

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return (shape[0], 1 if self.group == -1 else ceil(shape[1] / self.group))

    def spread(self, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """One number for each group (out, groups) -> one for each weight (out, in)."""
        if self.group == -1:
            return scale.expand(shape)
        if self.g_idx is not None:
            return scale[:, self.g_idx.int()]
        return scale.repeat_interleave(self.group, dim=1)[:, : shape[1]]

    def spec(self) -> dict[str, Any]:
        return {"kind": "rows", "group": self.group}


@dataclass(frozen=True)
class Tiles(AlongRows):
    """Tiles of `rows` x `columns` weights (-1: all of them); those at the edges may be short. One scale for each input
    channel is `Tiles(-1, 1)`."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return tuple(1 if size == -1 else ceil(n / size) for n, size in zip(shape, (self.rows, self.columns), strict=True))

    def spread(self, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """One number for each tile -> one for each weight (out, in)."""
        for dim, size in enumerate((self.rows, self.columns)):
            if size != -1:
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
        return scale.expand(shape)

    def spec(self) -> dict[str, Any]:
        return {"kind": "tiles", "rows": self.rows, "columns": self.columns}


@dataclass(frozen=True)
class Flat:
    """Blocks of `block` consecutive weights of the row-major flattened weight; the last block may be short."""

    block: int

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return (ceil(shape[0] * shape[1] / self.block),)

    def spread(self, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """One number for each block (blocks,) -> one for each weight (out, in)."""
        return scale.repeat_interleave(self.block)[: shape[0] * shape[1]].view(shape)

    def pack(self, codes: Tensor, bits: float) -> Tensor:
        return pack_trits(codes.flatten()) if bits == TERNARY_BITS else pack_bytes(codes.flatten(), int(bits))

    def unpack(self, packed: Tensor, bits: float, shape: tuple[int, int]) -> Tensor:
        n = shape[0] * shape[1]
        return (unpack_trits(packed, n) if bits == TERNARY_BITS else unpack_bytes(packed, int(bits), n)).view(shape)

    def spec(self) -> dict[str, Any]:
        return {"kind": "flat", "block": self.block}


IndexMap = Rows | Tiles | Flat


def read_index(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IndexMap:
    """The index map that `spec` describes; tensors: those of the part, of which `g_idx` belongs to it."""
    match spec:
        case {"kind": "rows", "group": group}:
            return Rows(group, tensors.get("g_idx"))
        case {"kind": "tiles", "rows": rows, "columns": columns}:
            return Tiles(rows, columns)
        case {"kind": "flat", "block": block}:
            return Flat(block)
    raise ValueError(f"unknown index map {dict(spec)}; known: rows, tiles, flat")
