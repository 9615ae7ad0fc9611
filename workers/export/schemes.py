"""What compressed-tensors can say of a weight: the scheme of its codes, and the tensors that the format stores for them.

No code is changed: operands of `Codes` (pare/methods/parts/codes.py) get other names, and where the format wants them other
places in memory. What compressed-tensors 0.20 and transformers 5.23 open on a CPU was tried out and decides what is said here:

| format | codes | opens |
|---|---|---|
| `pack-quantized` | integers of 1 to 8 bits; symmetric, a row or a group | plainly, in any dtype |
| | the same with zero points | only with `CompressedTensorsConfig(dequantize=True)`; so every layer must be of one scheme |
| `int-quantized` | integers of 8 bits with zero points | plainly, in any dtype |
| `float-quantized` | FP8 E4M3; a weight, a row or a group | plainly, in any dtype |
| `nvfp4-pack-quantized` | FP4 E2M1 in groups of 16, FP8 scales and a global one | plainly, in bfloat16 only |
| `mxfp4-pack-quantized` | FP4 E2M1 in groups of 32, power-of-two scales | plainly, in bfloat16 only |

Inputs may be quantised as well: to 8-bit integers before integers (of 8 bits in `int-quantized`, else packed), to FP8 before
FP8, to NVFP4 and MXFP4 before their like. `dequantize=True` would leave that out, so such zero points exclude it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.activations import E2M1, E4M3, ActivationQuantiser
from pare.methods.parts.codebooks import Integer, Minifloat, PowerOfTwo
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Dense, Formula

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"

FP8 = "torch.float8_e4m3fn"
INPUTS = {"int8": (PACKED, INT), "fp8_e4m3": (FLOAT,), "nvfp4": (NVFP4,), "mxfp4": (MXFP4,)}
"""Kind of an input's quantiser (`ActivationQuantiser.of`) -> formats of weights that it stands before."""

ROW, WEIGHT = -1, 0
"""Values of `Scheme.group` for one scale a row, and one for the whole weight."""


class Inexpressible(Exception):
    """A format has no words for a weight; the message says why."""


@dataclass(frozen=True, order=True)
class Scheme:
    """What a config group says of its linears."""

    format: str
    bits: int
    group: int
    """Columns that share a scale, `ROW` or `WEIGHT`."""
    symmetric: bool = True
    inputs: str = ""
    """Kind of the input's quantiser, a key of `INPUTS`; "": none."""
    is_static: bool = False
    """Whether the input's scale is stored."""

    @property
    def needs_dequantize(self) -> bool:
        return self.format == PACKED and not self.symmetric

    @property
    def needs_bfloat16(self) -> bool:
        return self.format in (NVFP4, MXFP4)

    def config(self, targets: list[str]) -> dict[str, Any]:
        kind = "int" if self.format in (PACKED, INT) else "float"
        weights: dict[str, Any] = {"num_bits": self.bits, "type": kind, "symmetric": self.symmetric, "dynamic": False}
        if self.group in (ROW, WEIGHT):
            weights["strategy"] = "channel" if self.group == ROW else "tensor"
        else:
            weights |= {"strategy": "tensor_group" if self.format == NVFP4 else "group", "group_size": self.group}
        if self.needs_bfloat16:
            weights["scale_dtype"] = FP8 if self.format == NVFP4 else "torch.uint8"
        found = {"targets": targets, "weights": weights, "format": self.format}
        return found | {"input_activations": self.input_config()} if self.inputs else found

    def input_config(self) -> dict[str, Any]:
        kind = "int" if self.inputs == "int8" else "float"
        said: dict[str, Any] = {"num_bits": 4 if self.needs_bfloat16 else 8, "type": kind, "symmetric": True}
        if self.inputs == "nvfp4":
            return said | {"dynamic": "local", "strategy": "tensor_group", "group_size": 16, "scale_dtype": FP8}
        if self.inputs == "mxfp4":
            return said | {"dynamic": True, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        return said | {"dynamic": not self.is_static, "strategy": "tensor" if self.is_static else "token"}


def scheme_of(formula: Formula) -> Scheme:
    """The scheme of a compressed weight.

    Raises:
        Inexpressible: there is none; the message goes on from the name of the weight.
    """
    if formula.transforms:
        raise Inexpressible("has transforms that run with the model")
    scheme = weight_scheme(formula)
    if formula.activation is None:
        return scheme
    inputs = kind_of_input(formula.activation)
    if inputs == "int8" and scheme.format == PACKED and scheme.bits == 8:
        scheme = replace(scheme, format=INT)
    if scheme.format not in INPUTS[inputs] or scheme.needs_dequantize:
        raise Inexpressible(f"has {inputs} inputs before weights in {scheme.format}, symmetric={scheme.symmetric}")
    return replace(scheme, inputs=inputs, is_static=inputs != "nvfp4" and formula.activation.scale is not None)


def kind_of_input(quantiser: ActivationQuantiser) -> str:
    """A key of `INPUTS`."""
    for name in INPUTS:
        given = quantiser.scale if name in ("nvfp4", "int8", "fp8_e4m3") else None
        if (name != "nvfp4" or given is not None) and ActivationQuantiser.of(name, given).spec() == quantiser.spec():
            return name
    raise Inexpressible(f"quantises its input in a way that no format has: {quantiser.spec()}")


def weight_scheme(formula: Formula) -> Scheme:
    """The scheme of the weight alone."""
    codes = formula.parts[0]
    if len(formula.parts) > 1:
        raise Inexpressible(f"is a sum of parts ({', '.join(part.kind for part in formula.parts)})")
    if not isinstance(codes, Codes):
        raise Inexpressible(f"is stored as {codes.kind}")
    if codes.offset is not None:
        raise Inexpressible("has an offset")
    book = codes.codebook
    if isinstance(book, Integer):
        return integer_scheme(codes, book, group_of(codes))
    if codes.zero is not None:
        raise Inexpressible("has zero points beside codes that are no integers")
    if book == E4M3:
        plain_scale(codes)
        return Scheme(FLOAT, 8, group_of(codes))
    if book == E2M1:
        return fp4_scheme(codes, group_of(codes))
    said = codes.codebook.spec()
    if said["kind"] == "table":
        raise Inexpressible(f"has codes of the table {said['name'] or 'stored with it'}, not integers or floats")
    if isinstance(book, Minifloat):
        raise Inexpressible(f"has codes E{book.exponent}M{book.mantissa}, which no format has")
    raise Inexpressible(f"has codes of the codebook {said}, which no format has")


def integer_scheme(codes: Codes, book: Integer, group: int) -> Scheme:
    plain_scale(codes)
    if group == WEIGHT:
        raise Inexpressible("has one scale for all its integers")
    if codes.zero is None and not book.signed:
        raise Inexpressible("has unsigned codes without a zero point")
    symmetric = codes.zero is None
    return Scheme(INT if book.bits == 8 and not symmetric else PACKED, book.bits, group, symmetric)


def fp4_scheme(codes: Codes, group: int) -> Scheme:
    """NVFP4 or MXFP4, which differ in their scales."""
    scale = codes.scale
    if not isinstance(scale, Codes) or scale.zero is not None or scale.offset is not None:
        raise Inexpressible("has FP4 codes whose scales are no codes")
    if group == 16 and scale.codebook == E4M3:
        if len(scale.scales().unique()) > 1:
            raise Inexpressible("has FP8 scales with more than one scale of their own")
        return Scheme(NVFP4, 4, group)
    if group == 32 and scale.codebook == PowerOfTwo():
        if not (scale.scales() == 1).all():
            raise Inexpressible("has power-of-two scales that are scaled once more")
        return Scheme(MXFP4, 4, group)
    said = f"groups of {group} with scales {scale.codebook.spec()}"
    raise Inexpressible(f"has FP4 codes in {said}; the formats have 16 with E4M3, and 32 with powers of two")


def is_dense(formula: Formula) -> bool:
    """Whether the formula is a plain weight and nothing else."""
    return all(isinstance(part, Dense) for part in formula.parts) and not (formula.transforms or formula.activation)


def group_of(codes: Codes) -> int:
    """Columns that share a scale."""
    columns, scale = codes.shape[1], codes.scale
    if isinstance(scale, Tensor) and scale.numel() == 1 and codes.shape[0] > 1:
        return WEIGHT
    if not isinstance(codes.index, Rows) or codes.index.g_idx is not None:
        raise Inexpressible("has groups that are not consecutive columns of a row")
    group = codes.index.group
    if group != ROW and columns % group:
        raise Inexpressible(f"has {columns} columns, which groups of {group} do not divide")
    return ROW if group == columns and codes.codebook != E2M1 else group


def plain_scale(codes: Codes) -> Tensor:
    if not isinstance(codes.scale, Tensor):
        raise Inexpressible("has scales that are codes themselves")
    return codes.scale


def stored_of(formula: Formula, scheme: Scheme) -> dict[str, Tensor]:
    """Name within the module -> what the checkpoint stores."""
    codes = formula.parts[0]
    if not isinstance(codes, Codes):
        raise TypeError(f"a scheme is of codes, not of {codes.kind}")
    stored = tensors_of(codes, scheme)
    scale = None if formula.activation is None else formula.activation.scale
    if scale is None:
        return stored
    # A global scale is kept as the number that one divides by.
    given = {"input_global_scale": 1 / scale.view(1)} if scheme.inputs == "nvfp4" else {"input_scale": scale.view(1)}
    return {**stored, **given}


def tensors_of(codes: Codes, scheme: Scheme) -> dict[str, Tensor]:
    """What the checkpoint stores of the weight."""
    if scheme.format == PACKED:
        named = {"weight_packed": codes.codes, "weight_scale": plain_scale(codes), "weight_shape": torch.tensor(codes.shape)}
        return named if codes.zero is None else {**named, "weight_zero_point": codes.zero}
    if scheme.format == INT:
        zero = codes.unpacked_zero()
        stored = {"weight": signed(codes.unpacked()), "weight_scale": plain_scale(codes)}
        return stored if zero is None else {**stored, "weight_zero_point": signed(zero)}
    if scheme.format == FLOAT:
        scale = plain_scale(codes)
        stored = {"weight": codes.unpacked().view(torch.float8_e4m3fn)}
        return {**stored, "weight_scale": scale.view(1) if scheme.group == WEIGHT else scale}
    low, high = codes.unpacked().unflatten(1, (-1, 2)).unbind(-1)
    scale = codes.scale
    assert isinstance(scale, Codes)  # `fp4_scheme` has seen it
    stored = {"weight_packed": low | high << 4, "weight_scale": scale.unpacked().view(codes.index.scale_shape(codes.shape))}
    if scheme.format == MXFP4:
        return stored
    stored["weight_scale"] = stored["weight_scale"].view(torch.float8_e4m3fn)
    # The format keeps the number that one divides by.
    return {**stored, "weight_global_scale": 1 / scale.scales().flatten()[:1]}


def signed(codes: Tensor) -> Tensor:
    """Codes uint8, 0 for the lowest, as the numbers int8 that they stand for with the offset 128."""
    return (codes ^ 128).view(torch.int8)
