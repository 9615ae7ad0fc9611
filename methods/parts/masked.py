"""A weight of which only some are kept: a bit for each weight, and the kept values row by row.

| name | what | dtype, shape |
|---|---|---|
| `mask` | a bit for each weight of the row-major flattened weight (`pack_bytes`) | uint8 (ceil(out * in / 8),) |
| `values` | the kept weights in that order | any float (kept,) |
|  | or a part of shape (1, kept), its operands under `values.` | |

N of M costs as much as any other half, 4 bits for each group of 4: two indices of 2 bits would cost the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.formula import Part, read_part, within
from pare.methods.parts.packing import pack_bytes, unpack_bytes


class Masked(Part):
    """See the module's description. Methods make one with `Masked.of`."""

    kind = "masked"

    def __init__(self, shape: tuple[int, int], mask: Tensor, values: Tensor | Part) -> None:
        """Operands as they are stored."""
        self.shape, self.mask, self.values = shape, mask, values

    @classmethod
    def of(cls, keep: Tensor, values: Tensor | Part) -> Masked:
        """keep (out, in) bool: which weights stay. values: those, row by row, (kept,) or a part of shape (1, kept).

        Raises:
            ValueError: there are not as many values as weights that stay.
        """
        kept = int(keep.sum())
        found = values.shape[0] if isinstance(values, Tensor) and values.dim() == 1 else values.shape[-1]
        if found != kept or (isinstance(values, Part) and values.shape[0] != 1):
            raise ValueError(f"masked: {kept} weights stay, and there are values of shape {tuple(values.shape)}")
        return cls((keep.shape[0], keep.shape[1]), pack_bytes(keep.flatten(), 1), values)

    def keep(self) -> Tensor:
        """Which weights stay, bool (out, in)."""
        return unpack_bytes(self.mask, 1, self.shape[0] * self.shape[1]).bool().view(self.shape)

    def materialise(self) -> Tensor:
        values = self.values if isinstance(self.values, Tensor) else self.values.materialise().flatten()
        weight = torch.zeros(self.shape, device=self.mask.device)
        weight[self.keep()] = values.float()
        return weight

    @property
    def logical_bits(self) -> int:
        values = 8 * self.values.nbytes if isinstance(self.values, Tensor) else self.values.logical_bits
        return self.shape[0] * self.shape[1] + values

    def tensors(self) -> dict[str, Tensor]:
        values = {"": self.values} if isinstance(self.values, Tensor) else self.values.tensors()
        return {"mask": self.mask} | {f"values.{name}".rstrip("."): t for name, t in values.items()}

    def spec(self) -> dict[str, Any]:
        values = None if isinstance(self.values, Tensor) else self.values.spec()
        return {"kind": self.kind, "shape": list(self.shape), "values": values}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Masked:
        values = tensors["values"] if spec["values"] is None else read_part(spec["values"], within("values", tensors))
        return cls((spec["shape"][0], spec["shape"][1]), tensors["mask"], values)
