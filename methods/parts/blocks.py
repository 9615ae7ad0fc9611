"""Weights of which only some blocks of r x c stay: on the diagonal, on and below it, on and above it, or anywhere.

| name | what | dtype, shape |
|---|---|---|
| `blocks` | the blocks that stay, one above the other, row of blocks by row of blocks | any float (count * r, c) |
|  | or a part of that shape, its operands under `blocks.` | |
| `mask` | pattern "any" only: a bit for each block (`pack_bytes`) | uint8 (ceil(block rows * block columns / 8),) |

With permutations around it, in a `Product`, a block-diagonal is what Monarch and its relatives are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pare.methods.parts.packing import pack_bytes, unpack_bytes
from pare.methods.parts.part import Operand, Part, operand_bits, operand_spec, operand_tensors, read_operand

PATTERNS = ("diagonal", "lower", "upper", "any")


class Blocks(Part):
    """See the module's description. Methods make one with `Blocks.of`."""

    kind = "blocks"

    def __init__(
        self, shape: tuple[int, int], grid: tuple[int, int], pattern: str, blocks: Operand, mask: Tensor | None = None
    ) -> None:
        """Operands as they are stored; grid: (rows, columns) of blocks."""
        self.shape, self.grid, self.pattern, self.blocks, self.mask = shape, grid, pattern, blocks, mask

    @classmethod
    def of(cls, shape: tuple[int, int], blocks: Operand, pattern: str | Tensor, count: int = 0) -> Blocks:
        """blocks (number of them * r, c). pattern: "diagonal", "lower" or "upper", of `count` x `count` blocks; or bool (block
        rows, block columns), which of them stay.

        Raises:
            ValueError: the blocks do not tile the shape, or there are not as many as stay.
        """
        grid = (count, count) if isinstance(pattern, str) else (pattern.shape[0], pattern.shape[1])
        name = pattern if isinstance(pattern, str) else "any"
        if name not in PATTERNS or (name == "any" and isinstance(pattern, str)):
            raise ValueError(f"blocks: the pattern must be diagonal, lower, upper or a mask, got {pattern!r}")
        if min(grid) < 1 or shape[0] % grid[0] or shape[1] % grid[1]:
            raise ValueError(f"blocks: {grid[0]} x {grid[1]} blocks do not tile a weight of shape {shape}")
        mask = None if isinstance(pattern, str) else pack_bytes(pattern.flatten(), 1)
        part = cls(shape, grid, name, blocks, mask)
        wanted = (len(part.places()) * shape[0] // grid[0], shape[1] // grid[1])
        if tuple(blocks.shape) != wanted:
            got = tuple(blocks.shape)
            raise ValueError(f"blocks: {name} of {grid[0]} x {grid[1]} takes blocks of shape {wanted}, got {got}")
        return part

    def places(self) -> Tensor:
        """Row and column of each block that stays, int64 (count, 2), row by row."""
        stays = torch.ones(self.grid, dtype=torch.bool, device="cpu")
        match self.pattern:
            case "diagonal":
                stays = torch.eye(self.grid[0], dtype=torch.bool, device="cpu")
            case "lower":
                stays = stays.tril()
            case "upper":
                stays = stays.triu()
            case _:
                assert self.mask is not None  # `of` stores one with this pattern
                stays = unpack_bytes(self.mask, 1, stays.numel()).view(self.grid)
        return stays.nonzero()

    def dense_blocks(self) -> Tensor:
        """(count, r, c) float32."""
        blocks = self.blocks.float() if isinstance(self.blocks, Tensor) else self.blocks.materialise()
        return blocks.view(-1, self.shape[0] // self.grid[0], self.shape[1] // self.grid[1])

    def materialise(self) -> Tensor:
        blocks = self.dense_blocks()
        places = self.places().to(blocks.device)
        weight = blocks.new_zeros(*self.grid, *blocks.shape[1:])
        weight[places[:, 0], places[:, 1]] = blocks
        return weight.transpose(1, 2).reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        blocks, places = self.dense_blocks().to(x.dtype), self.places().to(x.device)
        pieces = x.unflatten(-1, (self.grid[1], -1))[..., places[:, 1], :]
        products = torch.einsum("...bc,brc->...br", pieces, blocks)
        y = x.new_zeros(*x.shape[:-1], self.grid[0], blocks.shape[1])
        return y.index_add(-2, places[:, 0], products).flatten(-2)

    @property
    def macs(self) -> int:
        return torch.Size(self.blocks.shape).numel()

    @property
    def logical_bits(self) -> int:
        return operand_bits(self.blocks) + (0 if self.mask is None else self.grid[0] * self.grid[1])

    def nested(self) -> list[Part]:
        return [self.blocks] if isinstance(self.blocks, Part) else []

    def tensors(self) -> dict[str, Tensor]:
        return operand_tensors("blocks", self.blocks) | ({} if self.mask is None else {"mask": self.mask})

    def spec(self) -> dict[str, Any]:
        spec = {"kind": self.kind, "shape": list(self.shape), "grid": list(self.grid), "pattern": self.pattern}
        return spec | {"blocks": operand_spec(self.blocks)}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Blocks:
        shape, grid = (spec["shape"][0], spec["shape"][1]), (spec["grid"][0], spec["grid"][1])
        return cls(shape, grid, spec["pattern"], read_operand("blocks", spec["blocks"], tensors), tensors.get("mask"))
