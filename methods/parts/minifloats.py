"""Codebooks of floating-point numbers of 3 to 8 bits, and of powers of two, which scales may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Tables are kept for the life of the process, so they must not take on a caller's default device or dtype."""


@dataclass(frozen=True)
class Minifloat:
    """Small floating-point numbers; a code is their bit pattern: sign, exponent, mantissa, from the highest bit down.

    With bias B = 2^(exponent-1) - 1 (OCP MX v1.0, section 5.3): exponent field 0 stands for (m / 2^mantissa) * 2^(1-B), e > 0
    for (1 + m / 2^mantissa) * 2^(e-B). There are codes for 0 and -0.
    """

    exponent: int
    """Bits of the exponent, >= 1."""

    mantissa: int
    """Bits of the mantissa, >= 0."""

    special: str
    """Codes that are no finite numbers: "none"; "nan", the two with all bits below the sign set (FP8 E4M3FN); "ieee", those
    with all exponent bits set, infinities and NaNs (FP8 E5M2)."""

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or not 3 <= self.bits <= 8:
            raise ValueError(
                f"a minifloat has 3 to 8 bits, at least one of them exponent, got E{self.exponent}M{self.mantissa}"
            )
        if self.special not in ("none", "nan", "ieee"):
            raise ValueError(f"minifloat.special must be none, nan or ieee, got {self.special!r}")

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(magnitudes(self)[-1])

    @property
    def limit(self) -> float:
        """Half a step above the largest value: what is below it would be rounded down to it, were there a next one."""
        last, largest = magnitudes(self)[-2:].tolist()
        return float(largest + (largest - last) / 2)

    def lookup(self, codes: Tensor) -> Tensor:
        return values_of(self).to(codes.device)[codes.int()]

    def nearest(self, values: Tensor) -> Tensor:
        # The sign of zero is kept, as a cast of the hardware would.
        return nearest_even(magnitudes(self), values.abs()) | (values.signbit().to(torch.uint8) << (self.bits - 1))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def spec(self) -> dict[str, Any]:
        return {"kind": "minifloat", "exponent": self.exponent, "mantissa": self.mantissa, "special": self.special}


@cache
def magnitudes(book: Minifloat) -> Tensor:
    """The finite values without a sign, ascending: that of code i at place i."""
    code, unit = torch.arange(2 ** (book.bits - 1), **PLAIN), 2**book.mantissa
    field = (code / unit).floor()
    value = (code % unit / unit + (field > 0)) * 2.0 ** (field.clamp(min=1) - (2 ** (book.exponent - 1) - 1))
    dropped = {"none": 0, "nan": 1, "ieee": unit}[book.special]
    return value[: len(value) - dropped]


@cache
def values_of(book: Minifloat) -> Tensor:
    """The value of every code, (2^bits,)."""
    finite = magnitudes(book)
    value = torch.full((2 ** (book.bits - 1),), torch.nan, **PLAIN)
    value[: len(finite)] = finite
    if book.special == "ieee":
        value[len(finite)] = torch.inf
    return torch.cat([value, -value])


@dataclass(frozen=True)
class PowerOfTwo:
    """Powers of two from 2^-127 to 2^127, value 2^(code - 127); code 255 is NaN (E8M0: OCP MX v1.0, section 5.4.1)."""

    bits: int = field(default=8, init=False)

    def lookup(self, codes: Tensor) -> Tensor:
        return torch.cat([powers_of_two(), torch.tensor([torch.nan], **PLAIN)]).to(codes.device)[codes.int()]

    def nearest(self, values: Tensor) -> Tensor:
        """Nearest as a number: 2.9 goes to 2 and 3.1 to 4. What is not positive goes to 2^-127."""
        return nearest_even(powers_of_two(), values)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def spec(self) -> dict[str, Any]:
        return {"kind": "power_of_two"}


@cache
def powers_of_two() -> Tensor:
    return torch.ldexp(torch.ones(255, dtype=torch.float64, device="cpu"), torch.arange(-127, 128, device="cpu")).float()


def power_above(x: Tensor) -> Tensor:
    """x (...) float32, >= 0 -> the smallest power of two that is larger; 1 for 0."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent)


def nearest_even(entries: Tensor, values: Tensor) -> Tensor:
    """entries (n,) ascending float32; values (...) -> index uint8 (...) of the nearest entry, of two equally near ones the even
    index, outside the range the end ones."""
    middle = ((entries[1:].double() + entries[:-1].double()) / 2).float().to(values.device)
    values = values.contiguous()
    below, above = (torch.bucketize(values, middle, out_int32=True, right=right) for right in (False, True))
    return torch.where(below % 2 == 0, below, above).to(torch.uint8)
