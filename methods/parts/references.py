"""A weight, or some of its rows and columns, that is stored under another name: ties, shared blocks, children of a parent.

It holds no tensors, so that what it refers to costs its bytes once, where it stands. Whoever reads the file tells it where
that is, with `Formula.resolve`; until then its shape, bytes and file form are known, its numbers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pare.methods.parts.formula import Formula
from pare.methods.parts.part import Part

Span = tuple[int, int]
"""From the first to before the second."""


class Reference(Part):
    kind = "reference"

    def __init__(self, weight: str, shape: tuple[int, int], rows: Span | None = None, columns: Span | None = None) -> None:
        """weight: the name under which the other one stands in the table of tensors. shape: (out, in) of what is read of it.
        rows, columns: which; None: all."""
        for span, size in ((rows, shape[0]), (columns, shape[1])):
            if span is not None and (span[0] < 0 or span[1] - span[0] != size):
                raise ValueError(f"reference to {weight}: [{span[0]}, {span[1]}) is not {size} rows or columns")
        self.weight, self.shape, self.rows, self.columns = weight, shape, rows, columns
        self.target: Formula | None = None

    def resolve(self, look_up: Callable[[str], Formula]) -> None:
        target = look_up(self.weight)
        for span, size, there in zip((self.rows, self.columns), self.shape, target.shape, strict=True):
            if there < span[1] if span else there != size:
                raise ValueError(f"reference to {self.weight}: {self.spec()} does not fit its shape, {target.shape}")
        self.target = target

    def found(self) -> Formula:
        if self.target is None:
            raise RuntimeError(f"the reference to {self.weight} has not been resolved; call Formula.resolve with a look-up")
        return self.target

    def references(self) -> dict[str, Formula]:
        return {} if self.target is None else {self.weight: self.target}

    def materialise(self) -> Tensor:
        return self.found().materialise()[slice(*(self.rows or (None,))), slice(*(self.columns or (None,)))]

    def apply(self, x: Tensor) -> Tensor:
        whole = self.rows is None and self.columns is None
        return self.found().apply(x) if whole else super().apply(x)

    @property
    def macs(self) -> int:
        whole = self.rows is None and self.columns is None and self.target is not None
        return self.found().macs if whole else super().macs

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def spec(self) -> dict[str, Any]:
        spans = {"rows": list(self.rows) if self.rows else None, "columns": list(self.columns) if self.columns else None}
        return {"kind": self.kind, "weight": self.weight, "shape": list(self.shape)} | spans

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        rows, columns = (None if spec[span] is None else (spec[span][0], spec[span][1]) for span in ("rows", "columns"))
        return cls(spec["weight"], (spec["shape"][0], spec["shape"][1]), rows, columns)
