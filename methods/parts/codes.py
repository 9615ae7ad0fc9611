"""A weight as codes: `w = scale * (codebook[code] - codebook[zero]) + offset`, float32.

Four things are kept apart: the *codebook* (what a code stands for), the *index map* (which weights share a scale, and
how their codes lie in memory), the *codes* and the *scale*. The scale is a tensor in the dtype in which it is stored, or
itself a part. A codebook may be of vectors, so that a code stands for several weights. Operands, as they are stored:

| name | what | dtype, shape |
|---|---|---|
| `codes` | `Rows`, `Tiles`: packed along the row (`pack_words`) | int32 (out, ceil(in * bits / 32)) |
|         | `Flat`: packed along the flattened weight (`pack_bytes`) | uint8 (ceil(out * in * bits / 8),) |
|         | ternary: `pack_trits` along the row, or along the flattened weight | uint8 (out, ceil(in / 5)) or flat |
| `scale` | one for each group; with a part as scale, its operands under `scale.` | any float; (out, groups) or (blocks,) |
|         | or one for all | any float; () |
| `zero` | optional, not with `Flat`: zero points as codes, packed down the rows | int32 (ceil(out * bits / 32), groups) |
| `g_idx` | optional, `Rows` only: the group that a column belongs to | int32 (in,) |
| `offset` | optional: added to every weight | float32 () |
| `codebook.values` | only where the codebook is not fixed | any float (2^bits,), see `Table` and `Vectors` |

Other formats are a renaming of these:
- compressed-tensors `pack-quantized`: codes, scale, zero -> weight_packed, weight_scale, weight_zero_point (no short last
  group and no g_idx there). The codes lie there with the offset 2^(bits-1), which is what `Integer` stores as well.
- bitsandbytes NF4, double-quantised: codes -> weight (as a column), scale.codes -> weight.absmax, scale.scale ->
  weight.nested_absmax, scale.offset -> nested_offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.codebooks import TERNARY_BITS, Codebook, Table, read_codebook
from pare.methods.parts.index_maps import Flat, IndexMap, Rows, Tiles, read_index
from pare.methods.parts.packing import pack_words, unpack_words
from pare.methods.parts.part import Operand, Part, operand_spec, operand_tensors, read_operand, within
from pare.methods.parts.vectors import Vectors

__all__ = ["Codes", "Flat", "Rows", "Tiles"]


class Codes(Part):
    """See the module's description. Methods make one with `Codes.of`."""

    kind = "codes"

    def __init__(
        self,
        shape: tuple[int, int],
        codes: Tensor,
        codebook: Codebook | Vectors,
        index: IndexMap,
        scale: Operand,
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
        codebook: Codebook | Vectors,
        index: IndexMap,
        scale: Operand,
        zero: Tensor | None = None,
        offset: Tensor | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Codes:
        """From codes (out, in) and, if any, zero points (out, groups), both unsigned and not yet packed.

        scale: `index.scale_shape` numbers, or one of shape (), in the dtype in which they are to be stored; the codes must
        have been made with these very numbers, not with the ones before the cast.
        shape: (out, in), to be given where the codebook is of vectors and the codes are fewer.
        """
        if isinstance(codebook, Vectors):
            if shape is None or codebook.code_shape(shape) != tuple(codes.shape):
                takes = "a shape (out, in)" if shape is None else f"{codebook.code_shape(shape)} codes"
                raise ValueError(f"a codebook of vectors takes {takes}, got {shape} and {tuple(codes.shape)} codes")
        else:
            shape = (codes.shape[0], codes.shape[1])
        scales = (scale if isinstance(scale, Tensor) else scale.materialise()).numel()
        wanted, for_all = index.scale_shape(shape), isinstance(scale, Tensor) and scale.dim() == 0
        fits = scales == torch.Size(wanted).numel() and (isinstance(scale, Part) or tuple(scale.shape) == wanted)
        if not fits and not for_all:
            raise ValueError(f"codes of shape {shape} in {index.spec()} take scales of shape {wanted}, got {scales} of them")
        packed_zero = None
        if zero is not None:
            if isinstance(index, Flat) or tuple(zero.shape) != wanted:
                raise ValueError(f"zero points are for groups of rows and of shape {wanted}, got {tuple(zero.shape)}")
            if codebook.bits == TERNARY_BITS or isinstance(codebook, Vectors) or tables_of(codebook) > 1:
                raise ValueError(f"zero points do not go with the codebook {codebook.spec()}")
            # A clone, for a single column passes as contiguous with strides that safetensors cannot write.
            packed_zero = pack_words(zero.T, int(codebook.bits)).T.clone(memory_format=torch.contiguous_format)
        return cls(shape, index.pack(codes, codebook.bits), codebook, index, scale, packed_zero, offset)

    @property
    def code_shape(self) -> tuple[int, int]:
        return self.codebook.code_shape(self.shape) if isinstance(self.codebook, Vectors) else self.shape

    def unpacked(self) -> Tensor:
        """The codes, (out, in) or, of vectors, `code_shape`; uint8, above 8 bits int32."""
        return self.index.unpack(self.codes, self.codebook.bits, self.code_shape)

    def unpacked_zero(self) -> Tensor | None:
        """The zero points as codes, uint8 (out, groups)."""
        if self.zero is None:
            return None
        return unpack_words(self.zero.T, int(self.codebook.bits), self.index.scale_shape(self.shape)[0]).T

    def scales(self) -> Tensor:
        """The scales as numbers, float32 (out, groups) or (blocks,)."""
        scale = self.scale if isinstance(self.scale, Tensor) else self.scale.materialise()
        shape = self.index.scale_shape(self.shape)
        return scale.float().expand(shape) if scale.dim() == 0 else scale.float().view(shape)

    def materialise(self) -> Tensor:
        weight = self.codebook.lookup(self.unpacked())[: self.shape[0], : self.shape[1]]
        zero = self.unpacked_zero()
        if zero is not None:
            weight = weight - self.index.spread(self.codebook.lookup(zero), self.shape)
        weight = weight * self.index.spread(self.scales(), self.shape)
        return weight if self.offset is None else weight + self.offset

    @property
    def logical_bits(self) -> int:
        packed = self.codes.nbytes + (0 if self.zero is None else self.zero.nbytes)
        numbers = torch.Size(self.code_shape).numel()
        if self.zero is not None:
            numbers += torch.Size(self.index.scale_shape(self.shape)).numel()
        scale = 0 if isinstance(self.scale, Tensor) else self.scale.nbytes * 8 - self.scale.logical_bits
        return (self.nbytes - packed) * 8 - scale + round(numbers * self.codebook.bits)

    def nested(self) -> list[Part]:
        return [self.scale] if isinstance(self.scale, Part) else []

    def tensors(self) -> dict[str, Tensor]:
        g_idx = self.index.g_idx if isinstance(self.index, Rows) else None
        optional = {"zero": self.zero, "g_idx": g_idx, "offset": self.offset}
        tensors = {"codes": self.codes} | operand_tensors("scale", self.scale)
        tensors |= {name: t for name, t in optional.items() if t is not None}
        return tensors | {f"codebook.{name}": t for name, t in self.codebook.tensors().items()}

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "codebook": self.codebook.spec(),
            "index": self.index.spec(),
            "scale": operand_spec(self.scale),
        }

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codes:
        return cls(
            (spec["shape"][0], spec["shape"][1]),
            tensors["codes"],
            read_codebook(spec["codebook"], within("codebook", tensors)),
            read_index(spec["index"], tensors),
            read_operand("scale", spec["scale"], tensors),
            tensors.get("zero"),
            tensors.get("offset"),
        )


def tables_of(codebook: Codebook) -> int:
    """How many tables the weight is divided among."""
    return len(codebook.values) if isinstance(codebook, Table) and codebook.values.dim() == 2 else 1
