"""A weight as codes: `w = scale * (codebook[code] - codebook[zero]) + offset`, float32.

Four things are kept apart: the *codebook* (what a code stands for), the *index map* (which weights share a scale, and
how their codes lie in memory), the *codes* and the *scale*. The scale is a tensor in the dtype in which it is stored, or
itself a part. Operands, as they are stored:

| name | what | dtype, shape |
|---|---|---|
| `codes` | `Rows`: packed along the row (`pack_words`) | int32 (out, ceil(in * bits / 32)) |
|         | `Flat`: packed along the flattened weight (`pack_bytes`) | uint8 (ceil(out * in * bits / 8),) |
| `scale` | one for each group; with a part as scale, its operands under `scale.` | any float; (out, groups) or (blocks,) |
| `zero` | optional, `Rows` only: zero points as codes, packed down the rows | int32 (ceil(out * bits / 32), groups) |
| `g_idx` | optional, `Rows` only: the group that a column belongs to | int32 (in,) |
| `offset` | optional: added to every weight | float32 () |
| `codebook.values` | only where the codebook is not fixed | float32 (2^bits,) |

Other formats are a renaming of these:
- compressed-tensors `pack-quantized`: codes, scale, zero -> weight_packed, weight_scale, weight_zero_point (no short last
  group and no g_idx there). The codes lie there with the offset 2^(bits-1), which is what `Integer` stores as well.
- bitsandbytes NF4, double-quantised: codes -> weight (as a column), scale.codes -> weight.absmax, scale.scale ->
  weight.nested_absmax, scale.offset -> nested_offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.codebooks import Codebook, read_codebook
from pare.methods.parts.formula import Part, read_part, within
from pare.methods.parts.packing import pack_bytes, pack_words, unpack_bytes, unpack_words


@dataclass(frozen=True, eq=False)
class Rows:
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

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        return pack_words(codes, bits)

    def unpack(self, packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
        return unpack_words(packed, bits, shape[1])

    def spec(self) -> dict[str, Any]:
        return {"kind": "rows", "group": self.group}


@dataclass(frozen=True)
class Flat:
    """Blocks of `block` consecutive weights of the row-major flattened weight; the last block may be short."""

    block: int

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return (ceil(shape[0] * shape[1] / self.block),)

    def spread(self, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """One number for each block (blocks,) -> one for each weight (out, in)."""
        return scale.repeat_interleave(self.block)[: shape[0] * shape[1]].view(shape)

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        return pack_bytes(codes.flatten(), bits)

    def unpack(self, packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
        return unpack_bytes(packed, bits, shape[0] * shape[1]).view(shape)

    def spec(self) -> dict[str, Any]:
        return {"kind": "flat", "block": self.block}


class Codes(Part):
    """See the module's description. Methods make one with `Codes.of`."""

    kind = "codes"

    def __init__(
        self,
        shape: tuple[int, int],
        codes: Tensor,
        codebook: Codebook,
        index: Rows | Flat,
        scale: Tensor | Part,
        zero: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        """Operands as they are stored."""
        self.shape, self.codes, self.codebook, self.index = shape, codes, codebook, index
        self.scale, self.zero, self.offset = scale, zero, offset

    @classmethod
    def of(
        cls,
        codes: Tensor,
        codebook: Codebook,
        index: Rows | Flat,
        scale: Tensor | Part,
        zero: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Codes:
        """From codes (out, in) and, if any, zero points (out, groups), both unsigned and not yet packed.

        scale: `index.scale_shape` numbers, in the dtype in which they are to be stored; the codes must have been made with
        these very numbers, not with the ones before the cast.
        """
        shape = (codes.shape[0], codes.shape[1])
        scales = (scale if isinstance(scale, Tensor) else scale.materialise()).numel()
        wanted = index.scale_shape(shape)
        if scales != torch.Size(wanted).numel() or (isinstance(scale, Tensor) and tuple(scale.shape) != wanted):
            raise ValueError(f"codes of shape {shape} in {index.spec()} take scales of shape {wanted}, got {scales} of them")
        packed_zero = None
        if zero is not None:
            if not isinstance(index, Rows) or tuple(zero.shape) != wanted:
                raise ValueError(f"zero points are for groups of rows and of shape {wanted}, got {tuple(zero.shape)}")
            # A clone, for a single column passes as contiguous with strides that safetensors cannot write.
            packed_zero = pack_words(zero.T, codebook.bits).T.clone(memory_format=torch.contiguous_format)
        return cls(shape, index.pack(codes, codebook.bits), codebook, index, scale, packed_zero, offset)

    def unpacked(self) -> Tensor:
        """The codes, uint8 (out, in)."""
        return self.index.unpack(self.codes, self.codebook.bits, self.shape)

    def unpacked_zero(self) -> Tensor | None:
        """The zero points as codes, uint8 (out, groups)."""
        return None if self.zero is None else unpack_words(self.zero.T, self.codebook.bits, self.shape[0]).T

    def scales(self) -> Tensor:
        """The scales as numbers, float32 (out, groups) or (blocks,)."""
        scale = self.scale if isinstance(self.scale, Tensor) else self.scale.materialise()
        return scale.float().view(self.index.scale_shape(self.shape))

    def materialise(self) -> Tensor:
        weight = self.codebook.lookup(self.unpacked())
        zero = self.unpacked_zero()
        if zero is not None:
            weight = weight - self.index.spread(self.codebook.lookup(zero), self.shape)
        weight = weight * self.index.spread(self.scales(), self.shape)
        return weight if self.offset is None else weight + self.offset

    @property
    def logical_bits(self) -> int:
        packed = self.codes.nbytes + (0 if self.zero is None else self.zero.nbytes)
        numbers = self.shape[0] * self.shape[1] + (0 if self.zero is None else self.shape[0] * self.zero.shape[1])
        return (self.nbytes - packed) * 8 + numbers * self.codebook.bits

    def tensors(self) -> dict[str, Tensor]:
        scale = {"": self.scale} if isinstance(self.scale, Tensor) else self.scale.tensors()
        tensors = {"codes": self.codes} | {f"scale.{name}".rstrip("."): t for name, t in scale.items()}
        g_idx = self.index.g_idx if isinstance(self.index, Rows) else None
        optional = {"zero": self.zero, "g_idx": g_idx, "offset": self.offset}
        tensors |= {name: t for name, t in optional.items() if t is not None}
        return tensors | {f"codebook.{name}": t for name, t in self.codebook.tensors().items()}

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "codebook": self.codebook.spec(),
            "index": self.index.spec(),
            "scale": None if isinstance(self.scale, Tensor) else self.scale.spec(),
        }

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codes:
        index = spec["index"]
        return cls(
            (spec["shape"][0], spec["shape"][1]),
            tensors["codes"],
            read_codebook(spec["codebook"], within("codebook", tensors)),
            Flat(index["block"]) if index["kind"] == "flat" else Rows(index["group"], tensors.get("g_idx")),
            tensors["scale"] if spec["scale"] is None else read_part(spec["scale"], within("scale", tensors)),
            tensors.get("zero"),
            tensors.get("offset"),
        )
