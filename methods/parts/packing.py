"""Unsigned codes of 1 to 16 bits, or of three values, to dense words and back.

Three layouts:
- `pack_words`: along the last dimension, least significant bit first, into int32. Element i of a row lies at bits
  [i * bits, (i + 1) * bits), across a word boundary where need be: the layout of compressed-tensors 0.20.
- `pack_bytes`: a flat run into uint8, most significant bits first, for widths that divide 8: the layout of bitsandbytes.
- `pack_trits`: along the last dimension, five codes 0, 1 or 2 to a byte, as the digits of a number to base 3, lowest first.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """codes (..., n) integers in [0, 2^bits), bits 1 to 16 -> int32 (..., ceil(n * bits / 32))."""
    check_width(bits, range(1, 17))
    n = codes.shape[-1]
    # Up to 8 bits a code touches one byte or two, and all arithmetic stays in uint8.
    codes = pad(codes.to(torch.uint8 if bits <= 8 else torch.int32), (0, -n % 32)).unflatten(-1, (-1, 8))
    stream = torch.zeros(*codes.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for i, byte, shift in places(bits):
        piece = codes[..., i] << shift if shift >= 0 else codes[..., i] >> -shift
        stream[..., byte] |= (piece & 255).to(torch.uint8)
    return stream.flatten(-2).view(torch.int32)[..., : ceil(n * bits / 32)].contiguous()


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """words int32 (..., ceil(n * bits / 32)) -> codes (..., n), uint8 up to 8 bits and int32 above."""
    check_width(bits, range(1, 17))
    if words.shape[-1] != ceil(n * bits / 32):
        raise ValueError(f"{n} codes of {bits} bits fill {ceil(n * bits / 32)} words, got {words.shape[-1]}")
    # Flat in between: a single column may count as contiguous and still have no unit stride to be seen as bytes through.
    stream = words.contiguous().flatten().view(torch.uint8).view(*words.shape[:-1], -1)
    stream = pad(stream, (0, -stream.shape[-1] % bits)).unflatten(-1, (-1, bits))
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.zeros(*stream.shape[:-1], 8, dtype=dtype, device=words.device)
    for i, byte, shift in places(bits):
        piece = stream[..., byte].to(dtype)
        codes[..., i] |= piece >> shift if shift >= 0 else piece << -shift
    return codes.flatten(-2)[..., :n] & (2**bits - 1)


def places(bits: int) -> list[tuple[int, int, int]]:
    """Where eight codes lie in `bits` bytes: (code, byte, bits by which the code is shifted up in it), all pieces."""
    return [(i, byte, i * bits - 8 * byte) for i in range(8) for byte in range(i * bits // 8, ((i + 1) * bits - 1) // 8 + 1)]


def pack_trits(codes: Tensor) -> Tensor:
    """codes (..., n) of 0, 1 and 2 -> uint8 (..., ceil(n / 5))."""
    digits = pad(codes.to(torch.uint8), (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5))
    packed = digits[..., 4]
    for i in (3, 2, 1, 0):
        packed = packed * 3 + digits[..., i]
    return packed.contiguous()


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """packed uint8 (..., ceil(n / 5)) -> codes uint8 (..., n)."""
    if packed.shape[-1] != ceil(n / 5):
        raise ValueError(f"{n} codes of three values fill {ceil(n / 5)} bytes, got {packed.shape[-1]}")
    return torch.stack([packed // 3**i % 3 for i in range(5)], dim=-1).flatten(-2)[..., :n]


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """codes (n,) integers in [0, 2^bits) -> uint8 (ceil(n * bits / 8),), the first code in the highest bits."""
    check_width(bits, (1, 2, 4, 8))
    per_byte = 8 // bits
    codes = pad(codes.to(torch.uint8), (0, -len(codes) % per_byte)).view(-1, per_byte)
    packed = torch.zeros(len(codes), dtype=torch.uint8, device=codes.device)
    for i in range(per_byte):
        packed |= codes[:, i] << (8 - bits * (i + 1))
    return packed


def unpack_bytes(packed: Tensor, bits: int, n: int) -> Tensor:
    """packed uint8 (ceil(n * bits / 8),) -> codes uint8 (n,)."""
    check_width(bits, (1, 2, 4, 8))
    if len(packed) != ceil(n * bits / 8):
        raise ValueError(f"{n} codes of {bits} bits fill {ceil(n * bits / 8)} bytes, got {len(packed)}")
    shifts = [8 - bits * (i + 1) for i in range(8 // bits)]
    return torch.stack([packed >> shift for shift in shifts], dim=-1).flatten()[:n] & (2**bits - 1)


def check_width(bits: int, allowed: range | tuple[int, ...]) -> None:
    if bits not in allowed:
        raise ValueError(f"bits of a packed code must be one of {', '.join(map(str, allowed))}, got {bits}")
