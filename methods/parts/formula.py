"""A compressed weight: `y = L (part_1 + part_2 + ...) q(R x) + (parts that read x) x`.

The parts are summed. R and L are parts too, with an apply of their own, for transforms that the running model carries out
(one that has been folded into the parts or into a neighbour is not there any more). q quantises what R puts out, as every
method with both does it. A part that `reads` "x" stands beside all that: what is added to a weight that has transforms or a
quantised input, a repair or an adapter, needs to know of neither.

`Formula` also says whether it stands in place of the base model's weight or is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.activations import ActivationQuantiser
from pare.methods.parts.part import PARTS, Operand, Part, load_parts, read_part, within

__all__ = ["PARTS", "Dense", "Formula", "LowRank", "Operand", "Part", "load_parts", "read_part", "within"]


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

    @property
    def macs(self) -> int:
        return self.a.numel() + self.b.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a, "b": self.b}

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "scale": self.scale}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRank:
        return cls(tensors["a"], tensors["b"], spec["scale"])


@dataclass
class Formula:
    """In place of the base weight (`op="replace"`) or on top of it (`op="add"`)."""

    parts: list[Part]
    """At least one. Those that read "q" have one shape, those that read "x" the shape of the weight."""

    op: str = "replace"

    left: Part | None = None
    """L, (out, rows of the parts)."""

    right: Part | None = None
    """R, (columns of the parts, in)."""

    activation: ActivationQuantiser | None = None
    """q."""

    def __post_init__(self) -> None:
        if self.op not in ("replace", "add"):
            raise ValueError(f"formula.op must be replace or add, got {self.op!r}")
        inner, outer = ({part.shape for part in self.parts if part.reads == reads} for reads in ("q", "x"))
        if len(inner) > 1 or len(self.parts) == 0 or (not inner and self.transforms):
            raise ValueError(f"the parts of one weight must have one shape, got {sorted(inner)}")
        if inner and any(shape != self.shape for shape in outer):
            raise ValueError(f"parts that read x must have the shape of the weight, {self.shape}, got {sorted(outer)}")
        for part in self.transforms:
            fits = part.shape[1] == self.inner_shape[0] if part is self.left else part.shape[0] == self.inner_shape[1]
            if not fits:
                raise ValueError(f"a transform of shape {part.shape} does not fit parts of shape {self.inner_shape}")

    @property
    def transforms(self) -> list[Part]:
        return [part for part in (self.left, self.right) if part is not None]

    @property
    def inner_shape(self) -> tuple[int, int]:
        """Shape of the parts that stand between the transforms."""
        return next((part.shape for part in self.parts if part.reads == "q"), self.parts[0].shape)

    @property
    def shape(self) -> tuple[int, int]:
        out, columns = self.inner_shape
        return (self.left.shape[0] if self.left else out, self.right.shape[1] if self.right else columns)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def logical_bits(self) -> int:
        extra = 0 if self.activation is None else 8 * sum(t.nbytes for t in self.activation.tensors().values())
        return sum(part.logical_bits for part in self.everything()) + extra

    @property
    def macs(self) -> int:
        """Multiply-adds for one input vector."""
        return sum(part.macs for part in self.everything())

    def everything(self) -> list[Part]:
        """The parts and the transforms."""
        return [*self.parts, *self.transforms]

    def resolve(self, look_up: Callable[[str], Formula]) -> Formula:
        """Gives every `Reference` in it the formula of the weight that it names; returns itself."""
        for part in self.everything():
            part.resolve(look_up)
        return self

    def references(self) -> dict[str, Formula]:
        """Name -> formula of the weights to which references in it lead, as far as they are resolved."""
        return {name: formula for part in self.everything() for name, formula in part.references().items()}

    def to(self, device: torch.device | str) -> Formula:
        """The same formula with its tensors on `device`."""
        again = Formula.from_tensors(self.spec(), {name: t.to(device) for name, t in self.tensors().items()})
        targets = {name: formula.to(device) for name, formula in self.references().items()}
        return again.resolve(targets.__getitem__) if targets else again

    def plus(self, added: Formula) -> Formula:
        """This weight with the parts of an `add` formula on top; where it has transforms or a quantiser they read x."""
        if added.transforms or added.activation:
            raise ValueError("what is added to a weight has transforms or a quantised input of its own: make it dense first")
        parts = [*added.parts]
        if self.transforms or self.activation:
            parts = [reading(part, "x") for part in parts]
        return Formula([*self.parts, *parts], self.op, self.left, self.right, self.activation)

    def materialise(self) -> Tensor:
        """The dense weight (out, in), float32, without q: the parts added in the order they stand in."""
        total = add_up([part.materialise() for part in self.parts if part.reads == "q"])
        if total is not None and self.left:
            total = self.left.materialise() @ total
        if total is not None and self.right:
            total = total @ self.right.materialise()
        total = add_up([*([] if total is None else [total]), *(p.materialise() for p in self.parts if p.reads == "x")])
        assert total is not None
        return total

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), without making the sum dense where a part knows how."""
        z = x if self.right is None else self.right.apply(x)
        z = z if self.activation is None else self.activation(z)
        ys = [part.apply(z) for part in self.parts if part.reads == "q"]
        if self.left and ys:
            ys = [self.left.apply(torch.stack(ys).sum(0))]
        ys += [part.apply(x) for part in self.parts if part.reads == "x"]
        return torch.stack(ys).sum(0)

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Part | ActivationQuantiser | None] = {str(i): part for i, part in enumerate(self.parts)}
        named |= {"left": self.left, "right": self.right, "activation": self.activation}
        return {f"{role}.{name}": t for role, of in named.items() if of is not None for name, t in of.tensors().items()}

    def spec(self) -> dict[str, Any]:
        parts = [part.spec() | ({} if part.reads == "q" else {"reads": part.reads}) for part in self.parts]
        around = {"left": self.left, "right": self.right, "activation": self.activation}
        spec = {"op": self.op, "shape": list(self.shape), "parts": parts}
        return spec | {role: of.spec() for role, of in around.items() if of is not None}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Formula:
        parts = []
        for i, found in enumerate(spec["parts"]):
            parts.append(reading(read_part(found, within(str(i), tensors)), found.get("reads", "q")))
        left, right = (read_part(spec[role], within(role, tensors)) if role in spec else None for role in ("left", "right"))
        activation = None
        if "activation" in spec:
            activation = ActivationQuantiser.from_tensors(spec["activation"], within("activation", tensors))
        return cls(parts, spec["op"], left, right, activation)


def reading(part: Part, reads: str) -> Part:
    """The same part, reading "q" or "x" (see `Part.reads`)."""
    if reads not in ("q", "x"):
        raise ValueError(f"a part reads q or x, got {reads!r}")
    if part.reads == reads:
        return part
    part = copy(part)
    part.reads = reads
    return part


def add_up(tensors: list[Tensor]) -> Tensor | None:
    """Sum in order; None of nothing."""
    return reduce(torch.add, tensors) if tensors else None
