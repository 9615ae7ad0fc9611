"""A compressed weight as a sum of parts: `W = part_1 + part_2 + ...`, read by `y = x @ W.T`.

A `Part` is one summand of known shape (out, in). It can be made dense, applied without being made dense, written to
and read from named tensors bit for bit, and its bytes are the bytes of those tensors. `Formula` is the sum, together
with whether it stands in place of the base model's weight or is added to it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

PARTS: dict[str, type[Part]] = {}
"""Every registered part by kind."""


class Part:
    """One summand of a weight. A subclass sets `kind` and is registered by its definition."""

    kind: ClassVar[str]
    shape: tuple[int, int]
    """(out, in) of the dense weight."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            PARTS[cls.kind] = cls

    def materialise(self) -> Tensor:
        """The dense weight (out, in), float32."""
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> x @ materialise().T (..., out), in x's dtype."""
        return x @ self.materialise().to(x.dtype).T

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name. A part within a part prefixes its names with its role and a dot."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """All that is not a tensor, as plain JSON. Holds `kind`."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """The inverse of (`spec`, `tensors`)."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, packed as they lie on disk."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def logical_bits(self) -> int:
        """Bits without the padding of packed words."""
        return self.nbytes * 8

    def to(self, device: torch.device | str) -> Part:
        """The same part with its tensors on `device`."""
        return self.from_tensors(self.spec(), {name: t.to(device) for name, t in self.tensors().items()})


def load_parts() -> dict[str, type[Part]]:
    """Imports every file of `pare.methods.parts`; returns the registry."""
    package = importlib.import_module("pare.methods.parts")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"pare.methods.parts.{module.name}")
    return PARTS


def read_part(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    """The part that `spec` and `tensors` describe."""
    if spec["kind"] not in PARTS and spec["kind"] not in load_parts():
        raise ValueError(f"unknown kind of part {spec['kind']!r}; known: {', '.join(sorted(PARTS))}")
    return PARTS[spec["kind"]].from_tensors(spec, tensors)


def within(role: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the part that plays `role`, with the role's prefix taken off."""
    return {name[len(role) + 1 :]: t for name, t in tensors.items() if name.startswith(role + ".")}


class Dense(Part):
    """A plain weight, stored in its own dtype."""

    kind = "dense"

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape = weight, (weight.shape[0], weight.shape[1])

    def materialise(self) -> Tensor:
        return self.weight.float()

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Dense:
        return cls(tensors["weight"])


class LowRank(Part):
    """`scale * B @ A` with A (rank, in) and B (out, rank); `scale` is a number, stored with the formula."""

    kind = "low_rank"

    def __init__(self, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"low_rank: A {tuple(a.shape)} and B {tuple(b.shape)} differ in rank")
        self.a, self.b, self.scale = a, b, scale
        self.shape = (b.shape[0], a.shape[1])

    def materialise(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())

    def apply(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.a.to(x.dtype).T @ self.b.to(x.dtype).T)

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a, "b": self.b}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "scale": self.scale}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRank:
        return cls(tensors["a"], tensors["b"], spec["scale"])


@dataclass
class Formula:
    """The sum of `parts`, in place of the base weight (`op="replace"`) or on top of it (`op="add"`)."""

    parts: list[Part]
    op: str = "replace"

    def __post_init__(self) -> None:
        if self.op not in ("replace", "add"):
            raise ValueError(f"formula.op must be replace or add, got {self.op!r}")
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1:
            raise ValueError(f"the parts of one weight must have one shape, got {sorted(shapes)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def logical_bits(self) -> int:
        return sum(part.logical_bits for part in self.parts)

    def to(self, device: torch.device | str) -> Formula:
        """The same formula with its tensors on `device`."""
        return Formula([part.to(device) for part in self.parts], self.op)

    def materialise(self) -> Tensor:
        """Sum of the parts (out, in), float32, added in the order they stand in."""
        total = self.parts[0].materialise()
        for part in self.parts[1:]:
            total = total + part.materialise()
        return total

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), without making the sum dense where a part knows how."""
        return torch.stack([part.apply(x) for part in self.parts]).sum(0)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    def spec(self) -> dict[str, Any]:
        return {"op": self.op, "shape": list(self.shape), "parts": [part.spec() for part in self.parts]}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Formula:
        return cls([read_part(p, within(str(i), tensors)) for i, p in enumerate(spec["parts"])], spec["op"])
