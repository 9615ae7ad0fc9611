"""Codebooks of vectors: one code stands for several weights (VPTQ, AQLM, GPTVQ).

`Codes` takes one in place of a codebook of numbers. A residual codebook is a second `Codes` in the sum of parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

SEARCH_CHUNK = 2**22
"""Distances held at a time while the nearest vectors are looked for."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """Code k stands for `values[k]`: d consecutive weights of a row or a column. The last vector may reach beyond the edge."""

    values: Tensor
    """(2^bits, d), or (books, 2^bits, d): the columns of codes fall into `books` equal stretches, each with its own.
    Any float; bits 1 to 16."""

    along: str = "row"
    """"row": a vector lies along a row of the weight, the codes are (out, ceil(in / d)); "column": (ceil(out / d), in)."""

    def __post_init__(self) -> None:
        n = self.values.shape[-2]
        if self.values.dim() not in (2, 3) or n & (n - 1) or not 2 <= n <= 2**16:
            got = tuple(self.values.shape)
            raise ValueError(f"a codebook of vectors is (2^bits, d) or (books, 2^bits, d), bits 1 to 16, got {got}")
        if self.along not in ("row", "column"):
            raise ValueError(f"vectors.along must be row or column, got {self.along!r}")

    @property
    def bits(self) -> int:
        return self.values.shape[-2].bit_length() - 1

    def code_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the weight -> shape of its codes."""
        (out, columns), d = shape, self.values.shape[-1]
        return (out, ceil(columns / d)) if self.along == "row" else (ceil(out / d), columns)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes (rows, columns) -> weights float32, d times as many along `along`, those over the edge included."""
        books = self.values.to(codes.device).float().view(-1, *self.values.shape[-2:])
        found = books.flatten(0, 1)[codes.int() + books.shape[1] * self.book_of(codes.shape[1], codes.device)]
        return found.flatten(1) if self.along == "row" else found.transpose(1, 2).flatten(0, 1)

    def nearest(self, values: Tensor) -> Tensor:
        """values float32 (out, in) -> codes of the nearest vectors; what lies over the edge does not count."""
        d, books = self.values.shape[-1], self.values.to(values.device).float().view(-1, *self.values.shape[-2:])
        rows, columns = self.code_shape((values.shape[0], values.shape[1]))
        if self.along == "row":
            cut = pad(values, (0, columns * d - values.shape[1]), value=torch.nan).view(rows, columns, d)
        else:
            cut = pad(values, (0, 0, 0, rows * d - len(values)), value=torch.nan).view(rows, d, columns).transpose(1, 2)
        inside, book = (~cut.isnan()).float(), self.book_of(columns, values.device)
        codes = torch.empty(rows, columns, dtype=torch.int32, device=values.device)
        for k, vectors in enumerate(books):
            mine = book == k
            pieces = zip(
                *(t[:, mine].flatten(0, 1).split(max(1, SEARCH_CHUNK // len(vectors))) for t in (cut, inside)), strict=True
            )
            # |v - c|^2 without |v|^2, which is the same for all c.
            found = [(i @ vectors.square().T - 2 * v.nan_to_num() @ vectors.T).argmin(1) for v, i in pieces]
            codes[:, mine] = torch.cat(found).int().view(rows, -1)
        return codes

    def book_of(self, columns: int, device: torch.device) -> Tensor:
        """(columns,) int32: which codebook a column of codes uses."""
        books = 1 if self.values.dim() == 2 else len(self.values)
        return torch.arange(columns, device=device, dtype=torch.int32) * books // columns

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def spec(self) -> dict[str, Any]:
        return {"kind": "vectors", "along": self.along}
