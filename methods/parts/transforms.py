"""Matrices that are cheaper than their size: what stands on the left and right of a formula, and chains of such.

They are parts like all others; `macs` is what they cost the running model. One that has been folded into a neighbour is not
written down at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.packing import pack_bytes, unpack_bytes
from pare.methods.parts.part import Part, read_part, within


class Diagonal(Part):
    """diag(values), values (n,) of any float."""

    kind = "diagonal"

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values, (len(values), len(values))

    def materialise(self) -> Tensor:
        return self.values.float().diag()

    def apply(self, x: Tensor) -> Tensor:
        return x * self.values.to(x.dtype)

    @property
    def macs(self) -> int:
        return len(self.values)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Diagonal:
        return cls(tensors["values"])


class Permutation(Part):
    """Puts element `order[i]` at place i; order int32 (n,)."""

    kind = "permutation"

    def __init__(self, order: Tensor) -> None:
        self.order, self.shape = order, (len(order), len(order))

    def materialise(self) -> Tensor:
        return torch.eye(len(self.order), device=self.order.device)[self.order.int()]

    def apply(self, x: Tensor) -> Tensor:
        return x[..., self.order.int()]

    @property
    def macs(self) -> int:
        return 0

    def tensors(self) -> dict[str, Tensor]:
        return {"order": self.order}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Permutation:
        return cls(tensors["order"])


class Hadamard(Part):
    """The orthogonal H D, or its transpose D H: D random signs, H the Walsh-Hadamard matrix of the largest power of two k that
    divides n over sqrt(k), n / k times down the diagonal.

    The signs are stored, a bit each, as uint8 (ceil(n / 8),): no file depends on how a seed turns into numbers. An orthogonal
    matrix over all of n = k m is `Kronecker(a dense one of m, Hadamard.of(k, seed))`.
    """

    kind = "hadamard"

    def __init__(self, n: int, signs: Tensor, transposed: bool = False) -> None:
        """Operands as they are stored."""
        self.signs, self.transposed, self.shape = signs, transposed, (n, n)
        self.block = n & -n

    @classmethod
    def of(cls, n: int, seed: int, transposed: bool = False) -> Hadamard:
        """On the CPU, with signs drawn from the seed."""
        return cls(n, pack_bytes(torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)), 1), transposed)

    def transpose(self) -> Hadamard:
        """Its inverse, too."""
        return Hadamard(self.shape[0], self.signs, not self.transposed)

    def materialise(self) -> Tensor:
        return self.apply(torch.eye(self.shape[0], device=self.signs.device)).T

    def apply(self, x: Tensor) -> Tensor:
        signs = unpack_bytes(self.signs, 1, self.shape[0]).to(x.dtype) * 2 - 1
        y = (x if self.transposed else x * signs).unflatten(-1, (-1, self.block))
        half = 1
        while half < self.block:
            a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
            y, half = torch.stack([a + b, a - b], -2).flatten(-3), half * 2
        y = (y * self.block**-0.5).flatten(-2)
        return y * signs if self.transposed else y

    @property
    def macs(self) -> int:
        return self.shape[0] * (self.block.bit_length() - 1)

    @property
    def logical_bits(self) -> int:
        return self.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "n": self.shape[0], "transposed": self.transposed}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Hadamard:
        return cls(spec["n"], tensors["signs"], spec["transposed"])


class Chain(Part):
    """What kinds that are made of a list of parts share."""

    factors: list[Part]

    def nested(self) -> list[Part]:
        return self.factors

    @property
    def logical_bits(self) -> int:
        return sum(part.logical_bits for part in self.factors)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, part in enumerate(self.factors) for name, t in part.tensors().items()}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "factors": [part.spec() for part in self.factors]}


def read_factors(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Part]:
    return [read_part(found, within(str(i), tensors)) for i, found in enumerate(spec["factors"])]


class Product(Chain):
    """factors[0] @ factors[1] @ ...: the last one meets the input first."""

    kind = "product"

    def __init__(self, factors: Sequence[Part]) -> None:
        for a, b in pairwise(factors):
            if a.shape[1] != b.shape[0]:
                raise ValueError(f"product: shapes {a.shape} and {b.shape} do not fit")
        self.factors, self.shape = list(factors), (factors[0].shape[0], factors[-1].shape[1])

    def materialise(self) -> Tensor:
        return reduce(torch.matmul, [part.materialise() for part in self.factors])

    def apply(self, x: Tensor) -> Tensor:
        return reduce(lambda y, part: part.apply(y), reversed(self.factors), x)

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.factors)

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Product:
        return cls(read_factors(spec, tensors))


class Kronecker(Chain):
    """a (x) b: with a (p, q) and b (r, s) a matrix (p r, q s), block (i, j) of which is a_ij b."""

    kind = "kronecker"

    def __init__(self, a: Part, b: Part) -> None:
        self.factors, self.shape = [a, b], (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])

    def materialise(self) -> Tensor:
        a, b = (part.materialise().contiguous() for part in self.factors)
        return torch.kron(a, b)

    def apply(self, x: Tensor) -> Tensor:
        a, b = self.factors
        y = b.apply(x.unflatten(-1, (a.shape[1], b.shape[1])))
        return a.apply(y.transpose(-1, -2)).transpose(-1, -2).flatten(-2)

    @property
    def macs(self) -> int:
        a, b = self.factors
        return b.macs * a.shape[1] + a.macs * b.shape[0]

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Kronecker:
        a, b = read_factors(spec, tensors)
        return cls(a, b)
