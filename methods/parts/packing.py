"""Unsigned codes of 1 to 8 bits to dense words and back.

Two layouts, one for each place where such words are read outside Pare:
- `pack_words`: along the last dimension, least significant bit first, into int32. Element i of a row lies at bits
  [i * bits, (i + 1) * bits), across a word boundary where need be: the layout of compressed-tensors 0.20.
- `pack_bytes`: a flat run into uint8, most significant bits first, for widths that divide 8: the layout of bitsandbytes.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """codes (..., n) integers in [0, 2^bits) -> int32 (..., ceil(n * bits / 32))."""
    check_width(bits, range(1, 9))
    n = codes.shape[-1]
    codes = pad(codes.to(torch.uint8), (0, -n % 32)).unflatten(-1, (-1, 8))
    # Eight codes fill `bits` bytes, so a code touches one byte or two, and all arithmetic stays in uint8.
    stream = torch.zeros(*codes.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= codes[..., i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= codes[..., i] >> (8 - shift)
    return stream.flatten(-2).view(torch.int32)[..., : ceil(n * bits / 32)].contiguous()


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """words int32 (..., ceil(n * bits / 32)) -> codes uint8 (..., n)."""
    check_width(bits, range(1, 9))
    if words.shape[-1] != ceil(n * bits / 32):
        raise ValueError(f"{n} codes of {bits} bits fill {ceil(n * bits / 32)} words, got {words.shape[-1]}")
    # Flat in between: a single column may count as contiguous and still have no unit stride to be seen as bytes through.
    stream = words.contiguous().flatten().view(torch.uint8).view(*words.shape[:-1], -1)
    stream = pad(stream, (0, -stream.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = torch.empty(*stream.shape[:-1], 8, dtype=torch.uint8, device=words.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        codes[..., i] = stream[..., byte] >> shift
        if shift + bits > 8:
            codes[..., i] |= stream[..., byte + 1] << (8 - shift)
    return codes.flatten(-2)[..., :n] & (2**bits - 1)


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
