"""A summand of a weight, and the register of its kinds.

A `Part` has a shape (out, in). It can be made dense, applied without being made dense, written to and read from named
tensors bit for bit, and its bytes are the bytes of those tensors. Parts may be made of parts.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pare.methods.parts.formula import Formula

PARTS: dict[str, type[Part]] = {}
"""Every registered part by kind."""


class Part:
    """One summand of a weight. A subclass sets `kind` and is registered by its definition."""

    kind: ClassVar[str]
    shape: tuple[int, int]
    """(out, in) of the dense weight."""
    reads: str = "q"
    """In a formula: "q", the part stands between its transforms and reads the quantised input; "x", it stands beside them and
    reads the input itself."""

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

    def nested(self) -> list[Part]:
        """The parts that it is made of."""
        return []

    def resolve(self, look_up: Callable[[str], Formula]) -> None:
        """Gives every `Reference` in it the formula of the weight that it names."""
        for part in self.nested():
            part.resolve(look_up)

    def references(self) -> dict[str, Formula]:
        """Name -> formula of the weights to which references in it lead, as far as they are resolved."""
        return {name: formula for part in self.nested() for name, formula in part.references().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, packed as they lie on disk."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def logical_bits(self) -> int:
        """Bits without the padding of packed words."""
        return self.nbytes * 8

    @property
    def macs(self) -> int:
        """Multiply-adds that `apply` takes for one input vector."""
        return self.shape[0] * self.shape[1]

    def to(self, device: torch.device | str) -> Part:
        """The same part with its tensors on `device`."""
        again = self.from_tensors(self.spec(), {name: t.to(device) for name, t in self.tensors().items()})
        again.reads = self.reads
        if targets := self.references():
            again.resolve({name: formula.to(device) for name, formula in targets.items()}.__getitem__)
        return again


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


Operand: TypeAlias = "Tensor | Part"
"""What a part is made of: numbers as they are stored, or numbers that are themselves a part."""


def operand_tensors(role: str, operand: Operand) -> dict[str, Tensor]:
    if isinstance(operand, Tensor):
        return {role: operand}
    return {f"{role}.{name}": t for name, t in operand.tensors().items()}


def operand_spec(operand: Operand) -> dict[str, Any] | None:
    """None for a tensor."""
    return None if isinstance(operand, Tensor) else operand.spec()


def operand_bits(operand: Operand) -> int:
    """Bits without padding."""
    return operand.nbytes * 8 if isinstance(operand, Tensor) else operand.logical_bits


def read_operand(role: str, spec: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Operand:
    """The inverse of (`operand_spec`, `operand_tensors`)."""
    return tensors[role] if spec is None else read_part(spec, within(role, tensors))
