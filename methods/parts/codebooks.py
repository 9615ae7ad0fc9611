"""What a code stands for: code (an unsigned integer of `bits` bits) -> value.

A codebook knows no scale, no group and no packing. `nf4`, `fp4` and `dynamic8` are fixed tables that bitsandbytes uses too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from pare.methods.parts.minifloats import PLAIN, Minifloat, PowerOfTwo
from pare.methods.parts.vectors import Vectors

TERNARY_BITS = 1.6
"""Bits of one code of three values: five of them in a byte."""

__all__ = [
    "TABLES",
    "TERNARY_BITS",
    "Codebook",
    "Integer",
    "Minifloat",
    "PowerOfTwo",
    "Table",
    "Ternary",
    "Vectors",
    "binary",
    "dynamic8",
    "fp4",
    "nf4",
    "read_codebook",
]


class Codebook(Protocol):
    """What `Codes` asks of a codebook. A further kind is a class like this and its line in `read_codebook`."""

    @property
    def bits(self) -> float:
        """Bits of one code: 1 to 8, or `TERNARY_BITS`."""

    def lookup(self, codes: Tensor) -> Tensor:
        """codes uint8 (...) -> values float32 (...)."""

    def nearest(self, values: Tensor) -> Tensor:
        """values float32 (...) -> codes uint8 (...) of the nearest entries; outside the range the end ones."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored with the codes; empty where `spec` says all."""

    def spec(self) -> dict[str, Any]:
        """All that is not a tensor, as plain JSON. Holds `kind`."""


@dataclass(frozen=True)
class Integer:
    """`2^bits` integers: [-2^(bits-1), 2^(bits-1)) when signed, stored with the offset 2^(bits-1), else [0, 2^bits)."""

    bits: int
    signed: bool

    @property
    def low(self) -> int:
        """The value of code 0."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    def lookup(self, codes: Tensor) -> Tensor:
        return codes.float() + self.low

    def nearest(self, values: Tensor) -> Tensor:
        return (values.round() - self.low).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def spec(self) -> dict[str, Any]:
        return {"kind": "integer", "bits": self.bits, "signed": self.signed}


@dataclass(frozen=True)
class Ternary:
    """-1, 0 and 1."""

    bits: float = field(default=TERNARY_BITS, init=False)

    def lookup(self, codes: Tensor) -> Tensor:
        return codes.float() - 1

    def nearest(self, values: Tensor) -> Tensor:
        return (values.round().clamp(-1, 1) + 1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def spec(self) -> dict[str, Any]:
        return {"kind": "ternary"}


@dataclass(frozen=True, eq=False)
class Table:
    """Any values, one for each code. A table with a `name` in `TABLES` costs no bytes; another one is stored."""

    values: Tensor
    """(2^bits,), or (n, 2^bits): the row-major weight falls into n equal stretches, each with its own table; n = out gives one
    for each row, n = out * groups one for each group of columns. Any float."""

    name: str | None = None

    def __post_init__(self) -> None:
        n = self.values.shape[-1]
        if n & (n - 1) or not 2 <= n <= 256:
            raise ValueError(f"a table holds 2, 4, ... or 256 values, got {n}")
        if self.values.dim() not in (1, 2) or not self.values.is_floating_point():
            raise ValueError(f"a table is (2^bits,) or (n, 2^bits), of floats, got {self.values.shape}, {self.values.dtype}")

    @property
    def bits(self) -> int:
        return self.values.shape[-1].bit_length() - 1

    def lookup(self, codes: Tensor) -> Tensor:
        values = self.values.to(codes.device).float()
        if values.dim() == 1:
            return values[codes.int()]
        return values.gather(1, codes.reshape(len(values), -1).long()).view(codes.shape)

    def nearest(self, values: Tensor) -> Tensor:
        tables = self.values.to(values.device).float().view(-1, self.values.shape[-1])
        table, order = tables.sort(stable=True)
        # A value half-way between two entries goes to the lower one.
        place = torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, values.reshape(len(tables), -1).contiguous())
        return order.gather(1, place).view(values.shape).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.name else {"values": self.values}

    def spec(self) -> dict[str, Any]:
        return {"kind": "table", "name": self.name}


@cache
def nf4() -> Table:
    """NormalFloat: quantiles of N(0, 1) with an exact zero, scaled to [-1, 1] (Dettmers et al., 2023, arXiv:2305.14314, eq. 4).

    Seven negative and eight positive quantiles, evenly spaced in probability; 0.9677083 is the one that the paper's code
    takes for the outermost. The order of float32 and float64 steps matters: it gives the table of bitsandbytes bit for bit.
    """
    outermost = 0.9677083
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, **PLAIN)[:-1].double())
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, **PLAIN)[:-1].double())
    values = torch.cat([negative, torch.zeros(1, **PLAIN), positive]).sort().values.float()
    return Table(values / values.max(), "nf4")


@cache
def fp4() -> Table:
    """The 4-bit floats of bitsandbytes, ascending: a third of E2M1's values with 0.0625/12 for its smallest, and zero twice.

    bitsandbytes numbers them in an order of its own (`methods/ops/bnb4bit.py`).
    """
    magnitude = torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12], **PLAIN) / 12
    return Table(torch.cat([-magnitude.flip(0), magnitude]), "fp4")


@cache
def dynamic8() -> Table:
    """Signed 8-bit numbers with an exponent of dynamic length (Dettmers, 2016, arXiv:1511.04561, section 2.3).

    For each decade 10^-6 ... 10^0 with 2^0 ... 2^6 steps: the midpoints of evenly spaced bounds in [0.1, 1], both signs;
    then 0 and 1.
    """
    values = [torch.zeros(1, **PLAIN), torch.ones(1, **PLAIN)]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, **PLAIN)
        middle = 10.0 ** (exponent - 6) * (bounds[1:] + bounds[:-1]) / 2
        values += [middle, -middle]
    return Table(torch.cat(values).sort().values, "dynamic8")


@cache
def binary() -> Table:
    """The two signs, 1 bit each."""
    return Table(torch.tensor([-1, 1], **PLAIN), "binary")


TABLES = {"nf4": nf4, "fp4": fp4, "dynamic8": dynamic8, "binary": binary}
"""Tables that are known by name and not stored."""


def read_codebook(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codebook | Vectors:
    """The inverse of (`spec`, `tensors`)."""
    match spec:
        case {"kind": "integer", "bits": bits, "signed": signed}:
            return Integer(bits, signed)
        case {"kind": "minifloat", "exponent": exponent, "mantissa": mantissa, "special": special}:
            return Minifloat(exponent, mantissa, special)
        case {"kind": "power_of_two"}:
            return PowerOfTwo()
        case {"kind": "ternary"}:
            return Ternary()
        case {"kind": "vectors", "along": along}:
            return Vectors(tensors["values"], along)
        case {"kind": "table", "name": None}:
            return Table(tensors["values"])
        case {"kind": "table", "name": name} if name in TABLES:
            return TABLES[name]()
    known = f"integer, minifloat, power_of_two, ternary, vectors, table of {', '.join(TABLES)} or of stored values"
    raise ValueError(f"unknown codebook {dict(spec)}; known: {known}")
