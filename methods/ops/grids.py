"""Integer grids with one scale for each group of a row: `w = scale * (code - zero)`, codes unsigned.

The settings stand here with their maths because every method that ends on such a grid has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.masked import Kept
from pare.methods.settings import SettingsError, check

SHRINK_STEPS, SMALLEST_SHRINK, ERROR_POWER = 50, 0.2, 2.4
"""The range search tries 1, 0.98, ... down to above 0.2 of the range and sums |error|^2.4. GPTQ's code takes steps half as
wide: twice the time, for no less harm to a model that could be measured."""

SEARCH_CHUNK = 2**17
"""Weights searched at a time: their copies stay in the cache."""


def in_groups(weight: Tensor, group: int) -> Tensor:
    """weight (out, in) -> (out, groups, group), a short last one filled up with zeros."""
    return pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales cast to a dtype; one that would become 0 or infinity becomes the smallest or largest number."""
    limits = torch.finfo(dtype)
    return scale.clamp(limits.smallest_normal * limits.eps, limits.max).to(dtype)


@dataclass
class IntegerGrid:
    """Settings of the grid; a method inherits them (see `methods/quantize/rtn.py`)."""

    name: ClassVar[str] = "grid"

    bits: int = 4
    """Bits of one code, 2 to 8."""

    group_size: int = 64
    """Consecutive input columns that share a scale, > 0; -1: the whole row."""

    symmetric: bool = True
    """True: no zero point, one scale for both signs. False: the grid spans [min, max] of its group, zero included."""

    sym_range: str = "full"
    """Symmetric grids: "full" puts the largest magnitude at 2^(bits-1) - 1/2 steps and uses all 2^bits codes (the convention of
    compressed-tensors); "narrow" puts it at 2^(bits-1) - 1 steps and leaves the lowest code out."""

    mse: bool = False
    """Search for each group the range that makes the summed |error|^2.4 smallest, instead of taking [min, max]. Slow."""

    scale_dtype: str = "bfloat16"
    """Dtype of the stored scales: "bfloat16", "float16" or "float32". An export opens in the dtype of its checkpoint, where
    scales of another dtype are cast once more: with float16 scales a bfloat16 model would not be what was measured."""

    short_last_group: bool = False
    """Allow a group size that does not divide the input width; the last group of a row is then short. Such a weight cannot be
    exported to compressed-tensors."""

    def __post_init__(self) -> None:
        check(self, "bits", at_least=2, at_most=8)
        if self.group_size != -1 and self.group_size < 1:
            raise SettingsError(self.name, "group_size", self.group_size, "-1 (the whole row) or at least 1")
        check(self, "sym_range", one_of=("full", "narrow"))
        check(self, "scale_dtype", one_of=("bfloat16", "float16", "float32"))

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Raises `SettingsError` for the first weight, name -> (out, in), that the group size does not divide."""
        if self.group_size == -1 or self.short_last_group:
            return
        for name, (_, width) in widths.items():
            if width % self.group_size:
                divisors = ", ".join(str(g) for g in range(16, min(width, 256) + 1) if width % g == 0)
                allowed = f"-1 or a divisor of {width}, the input width of {name}"
                allowed += f" (such as {divisors})" if divisors else ""
                raise SettingsError(self.name, "group_size", self.group_size, f"{allowed}, unless short_last_group=true")

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def bottom(self) -> int:
        """The lowest code."""
        return 1 if self.symmetric and self.sym_range == "narrow" else 0

    def width_of_group(self, n: int) -> int:
        """Columns of a group (the last one may have fewer) in rows of n."""
        return n if self.group_size == -1 else self.group_size

    def split(self, weight: Tensor) -> Tensor:
        """weight (out, in) -> (out, groups, columns of a group).

        A short last group is filled up with zeros, which changes no grid: every range holds zero, and zero is met exactly.
        """
        return in_groups(weight, self.width_of_group(weight.shape[1]))

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (..., columns of a group) -> scale (...), in the dtype in which it is stored, and zero (...), in weight's."""
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        if not self.mse:
            return self.scale_and_zero(low, high)
        rows = max(1, SEARCH_CHUNK // weight.shape[-1])
        pieces = zip(weight.flatten(0, -2).split(rows), low.flatten().split(rows), high.flatten().split(rows), strict=True)
        found = [self.search(*piece) for piece in pieces]
        scale, zero = (torch.cat(parts).view(low.shape) for parts in zip(*found, strict=True))
        return scale, zero

    def search(self, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """weight (n, columns of a group), low and high (n,) -> scale (n,), zero (n,) of the shrunken range with least error."""
        scale, zero = self.scale_and_zero(low, high)
        least = self.error(weight, scale, zero)
        for step in range(1, round(SHRINK_STEPS * (1 - SMALLEST_SHRINK))):
            shrink = 1 - step / SHRINK_STEPS
            other_scale, other_zero = self.scale_and_zero(shrink * low, shrink * high)
            error = self.error(weight, other_scale, other_zero)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
            # A weight inside the range errs by half a step at most. What is above that comes from weights outside, and grows
            # as the range shrinks: where it alone is more than the least error, no smaller range can be better.
            inside = weight.shape[-1] * (other_scale.to(weight.dtype) / 2) ** ERROR_POWER
            if ((error - inside > least) | (least == 0)).all():
                break
        return scale, zero

    def error(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Sum of |error|^2.4 over each group: weight (n, columns of a group) -> (n,)."""
        scale = scale.to(weight.dtype)
        steps = weight / scale.unsqueeze(-1)
        error = steps.sub_(steps.round().clamp_((self.bottom - zero).unsqueeze(-1), (self.top - zero).unsqueeze(-1)))
        # Half the time of pow, which is most of the search; the logarithm of no error is -inf, and comes back as 0.
        return error.abs_().log2_().mul_(ERROR_POWER).exp2_().sum(-1) * scale**ERROR_POWER

    def scale_and_zero(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Ranges [low, high] that hold zero, not empty -> scale, cast to its stored dtype, and zero for that scale."""
        if not self.symmetric:
            scale = self.stored((high - low) / self.top)
            return scale, (-low / scale.to(low.dtype)).round().clamp(0, self.top)
        steps = self.top / 2 if self.sym_range == "full" else 2 ** (self.bits - 1) - 1
        scale = self.stored(torch.maximum(-low, high) / steps)
        return scale, torch.full_like(low, 2 ** (self.bits - 1))

    def stored(self, scale: Tensor) -> Tensor:
        """The scale as it is stored."""
        return as_stored(scale, getattr(torch, self.scale_dtype))

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes of weight (...) on the given grid, whole numbers in weight's dtype; scale and zero broadcast against it."""
        return (weight / scale.to(weight.dtype)).round_().add_(zero).clamp_(self.bottom, self.top)

    def codes(
        self, codes: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor | None = None, left: Kept | None = None
    ) -> Codes | Kept:
        """The part made of codes (out, in), scale (out, groups) as stored, and zero (out, groups).

        left: the weights that are not zero. Where every group keeps as many, as with N:M, only their codes are stored; else all
        of them are, the others with the code of zero.
        """
        book, zeros = Integer(self.bits, signed=self.symmetric), None if self.symmetric else zero
        keep = None if left is None or g_idx is not None else left.keep()
        kept = 0 if keep is None else self.kept_of_group(keep)
        if left is None or not kept:
            return Codes.of(codes, book, Rows(self.group_size, g_idx), scale, zeros)
        index = Rows(-1 if self.group_size == -1 else kept)
        return left.with_values(Codes.of(codes[keep].view(len(codes), -1), book, index, scale, zeros))

    def kept_of_group(self, keep: Tensor) -> int:
        """How many weights stay in each group, the short last one of a row aside; 0 where that differs, or rows do."""
        counts = self.split(keep.int()).sum(-1)
        full = counts[:, : max(1, keep.shape[1] // self.width_of_group(keep.shape[1]))]
        return int(full[0, 0]) if (full == full[0, 0]).all() and (counts == counts[0]).all() else 0

    def round_to_nearest(self, weight: Tensor, left: Kept | None = None) -> Codes | Kept:
        """weight (out, in) -> codes, each weight rounded by itself. left: see `codes`; the other weights must be zero."""
        groups = self.split(weight)
        scale, zero = self.fit(groups)
        codes = self.encode(groups, scale.unsqueeze(-1), zero.unsqueeze(-1))
        return self.codes(codes.flatten(1)[:, : weight.shape[1]], scale, zero, left=left)

    def bits_per_weight(self, width: int) -> float:
        """Logical bits of one weight in rows of `width`: code, scale and zero point."""
        groups = ceil(width / self.width_of_group(width))
        scale = torch.finfo(getattr(torch, self.scale_dtype)).bits
        return self.bits + groups * (scale + (0 if self.symmetric else self.bits)) / width
