"""Codes as the blocks of GGUF's quantisation types, without being quantised a second time.

A type says `weight = d * v` for the 32 weights of a block (256 for TQ2_0), with `d` a float16; Q4_1 and Q5_1 say `d * v + m`.

| type | v | bytes of a block |
|---|---|---|
| TQ2_0 | -1, 0, 1 | d behind 64 of codes, four to a byte |
| Q4_0, Q5_0, Q8_0 | -8 to 7, -16 to 15, -128 to 127 | d; fifth bits; codes |
| Q4_1, Q5_1 | 0 to 15, 0 to 31 | d, m; fifth bits; codes |
| MXFP4 | E2M1, d a power of two | exponent; codes |

Codes that stand for integers, `s * (q - z)`, are of such a type where s is a float16 and `q - z` in its range, whatever their
own bits: so asymmetric codes of 3 bits are Q4_0 and of 4 bits Q5_0, unless `-s * z` is a float16 too, which makes them Q4_1.
The scale of a group of several blocks is written once for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pare.methods.parts.activations import E2M1
from pare.methods.parts.codebooks import PowerOfTwo
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.vectors import Vectors
from pare.workers.export.schemes import Inexpressible

BLOCK, LONG_BLOCK = 32, 256

RANGES = {"TQ2_0": (-1, 1), "Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q5_1": (0, 31), "Q8_0": (-128, 127)}
"""Types for integers, the fewest bytes first -> lowest and highest v."""


def blocks_of(codes: Codes) -> tuple[str, Tensor]:
    """(name of the type, bytes uint8 (out, bytes of a row)).

    Raises:
        Inexpressible: no type says these codes exactly; the message goes on from the name of the weight.
    """
    if codes.offset is not None:
        raise Inexpressible("has an offset")
    if not isinstance(codes.index, Rows) or codes.index.g_idx is not None:
        raise Inexpressible("has groups that are not consecutive columns of a row")
    if isinstance(codes.codebook, Vectors):
        raise Inexpressible("has codes of several weights each")
    columns = codes.shape[1]
    group = columns if codes.index.group == -1 else codes.index.group
    if group % BLOCK or columns % group:
        raise Inexpressible(f"has {columns} columns in groups of {group}; a type has blocks of {BLOCK}")
    if codes.codebook == E2M1 and codes.zero is None:
        return "MXFP4", mxfp4(codes, group)
    return integers(codes, group)


def mxfp4(codes: Codes, group: int) -> Tensor:
    scale = codes.scale
    is_power = isinstance(scale, Codes) and scale.codebook == PowerOfTwo() and bool((scale.scales() == 1).all())
    if not isinstance(scale, Codes) or not is_power:
        raise Inexpressible("has FP4 codes whose scales are no powers of two")
    exponent = scale.unpacked().view(codes.shape[0], -1).repeat_interleave(group // BLOCK, 1)
    return torch.cat([exponent[..., None], nibbles(by_block(codes.unpacked()))], -1).flatten(1)


def integers(codes: Codes, group: int) -> tuple[str, Tensor]:
    """The type of fewest bytes that says codes exactly which stand for integers, and the blocks."""
    scales, zero = codes.scales(), codes.unpacked_zero()
    if not representable(scales):
        raise Inexpressible("has scales that are no float16 numbers")
    values = codes.codebook.lookup(codes.unpacked())
    if zero is not None:
        values = values - codes.index.spread(codes.codebook.lookup(zero), codes.shape)
    if not (values == values.round()).all():
        raise Inexpressible(f"has codes of the codebook {codes.codebook.spec()}, which are no integers")
    low, high = (int(end) for end in values.aminmax())
    for name, (lowest, highest) in RANGES.items():
        if name == "TQ2_0" and group % LONG_BLOCK:
            continue
        if name.endswith("_1"):
            minimum = None if zero is None else -zero.float() * scales
            if minimum is not None and codes.codebook.bits <= highest.bit_length() and representable(minimum):
                return name, packed(name, codes.unpacked(), [per_block(t, group, BLOCK) for t in (scales, minimum)])
        elif lowest <= low and high <= highest:
            block = LONG_BLOCK if name == "TQ2_0" else BLOCK
            return name, packed(name, (values - lowest).to(torch.uint8), [per_block(scales, group, block)])
    raise Inexpressible(f"has codes from {low} to {high} about their zero points; Q8_0 has -128 to 127")


def representable(numbers: Tensor) -> bool:
    """Whether float16 has every number."""
    return bool((numbers.half().float() == numbers).all())


def per_block(numbers: Tensor, group: int, block: int) -> Tensor:
    """One number for each group (out, groups) -> the bytes of one float16 for each block, uint8 (out, blocks, 2)."""
    return numbers.half().repeat_interleave(group // block, 1)[..., None].contiguous().view(torch.uint8)


def packed(name: str, codes: Tensor, numbers: list[Tensor]) -> Tensor:
    """codes uint8 (out, in) counted from 0, numbers: bytes of d and, if any, of m -> uint8 (out, bytes of a row)."""
    if name == "TQ2_0":
        quarters = codes.unflatten(1, (-1, 2, 4, 32))
        byte = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
        return torch.cat([byte.flatten(2), *numbers], -1).flatten(1)
    blocks = by_block(codes)
    if name == "Q8_0":
        return torch.cat([*numbers, blocks ^ 128], -1).flatten(1)
    fifth = [fifth_bits(blocks)] if name.startswith("Q5") else []
    return torch.cat([*numbers, *fifth, nibbles(blocks & 15)], -1).flatten(1)


def by_block(codes: Tensor) -> Tensor:
    return codes.unflatten(1, (-1, BLOCK))


def nibbles(blocks: Tensor) -> Tensor:
    """4-bit codes (..., 32) -> uint8 (..., 16): the first half of a block in the low bits, the second in the high ones."""
    low, high = blocks.unflatten(-1, (2, BLOCK // 2)).unbind(-2)
    return low | high << 4


def fifth_bits(blocks: Tensor) -> Tensor:
    """5-bit codes (..., 32) -> uint8 (..., 4): bit i is the highest of code i."""
    bits = (blocks >> 4).unflatten(-1, (4, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=blocks.device)).sum(-1, dtype=torch.uint8)
