"""Floating-point grids with one scale for each group of a row: `w = scale * value of the code`.

    s = max|w| / largest value                                q = nearest(w / s), half-way to the even code, saturating

The scale of a group is first made what it is stored as, then its codes are chosen. What differs between formats is the
stored form: a float for the E/M formats; for NVFP4 an E4M3 float under one factor for the whole weight; for the microscaling
formats a power of two, the smallest under which the largest magnitude is less than half a step above the largest value.
NVFP4's factor is a power of two as well: multiplying by it and dividing by its reciprocal, as runtimes do, agree exactly.

The settings stand here with their maths because every method that ends on such a grid has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pare.methods.ops.grids import as_stored, in_groups
from pare.methods.ops.normal_float import nf4
from pare.methods.parts.codebooks import Minifloat, PowerOfTwo
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.minifloats import power_above
from pare.methods.settings import SettingsError, check

E4M3 = Minifloat(4, 3, "nan")


class Format(NamedTuple):
    book: Minifloat | None
    """None: NF4, whose codes are made in `normal_float`."""
    group: int
    """Columns that share a scale unless the settings say otherwise; -1: the whole row."""
    scales: str
    """"plain", "global" (E4M3 under a factor for all) or "power" (of two). The last two fix the group."""


FORMATS = {
    "fp8_e4m3": Format(E4M3, -1, "plain"),
    "fp8_e5m2": Format(Minifloat(5, 2, "ieee"), -1, "plain"),
    "fp6_e3m2": Format(Minifloat(3, 2, "none"), -1, "plain"),
    "fp6_e2m3": Format(Minifloat(2, 3, "none"), -1, "plain"),
    "fp4_e2m1": Format(Minifloat(2, 1, "none"), 64, "plain"),
    "fp3_e2m0": Format(Minifloat(2, 0, "none"), 64, "plain"),
    "nvfp4": Format(Minifloat(2, 1, "none"), 16, "global"),
    "mxfp4": Format(Minifloat(2, 1, "none"), 32, "power"),
    "mxfp8": Format(E4M3, 32, "power"),
    "nf4": Format(None, 64, "plain"),
}


@dataclass
class FloatGrid:
    """Settings of the grid; a method inherits them (see `methods/quantize/rtn_float.py`)."""

    name: ClassVar[str] = "float_grid"

    format: str = "nvfp4"
    """Format of the codes and their scales: fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3, fp4_e2m1, fp3_e2m0 (one scale a group);
    nvfp4, mxfp4, mxfp8 (scales of 8 bits, group fixed at 16, 32, 32); nf4 (quantiles of the normal distribution)."""

    group_size: int = 0
    """Consecutive input columns that share a scale; -1: the whole row; 0: as the format has it, or where that is free, 64
    and the whole row from 6 bits on. For nf4 consecutive weights of the flattened matrix, across the ends of rows."""

    scale_dtype: str = "bfloat16"
    """Dtype of the stored scales where the format does not fix it: "bfloat16", "float16" or "float32"."""

    double_quant: bool = False
    """nf4 only: store the scales as 8-bit codes too, 0.37 bits a weight less."""

    short_last_group: bool = False
    """Allow a group that does not divide the input width; the last group of a row is then short."""

    def __post_init__(self) -> None:
        check(self, "format", one_of=tuple(FORMATS))
        check(self, "scale_dtype", one_of=("bfloat16", "float16", "float32"))
        found = FORMATS[self.format]
        fixed = found.scales != "plain"
        allowed = f"0 or {found.group} with format={self.format}" if fixed else "0, -1 (the whole row) or at least 1"
        if self.group_size < -1 or (fixed and self.group_size not in (0, found.group)):
            raise SettingsError(self.name, "group_size", self.group_size, allowed)
        if self.format == "nf4" and self.group_size == -1:
            raise SettingsError(self.name, "group_size", self.group_size, "0 or at least 1 with format=nf4")
        if self.double_quant and self.format != "nf4":
            raise SettingsError(self.name, "double_quant", self.double_quant, f"false with format={self.format}")

    def check_shapes(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Raises `SettingsError` for the first weight, name -> (out, in), that the group does not divide."""
        if self.group == -1 or self.short_last_group or self.format == "nf4":
            return
        for name, (_, width) in widths.items():
            if width % self.group:
                fixed = FORMATS[self.format].scales != "plain"
                setting, got = ("format", self.format) if fixed else ("group_size", self.group_size)
                allowed = f"one with groups that divide {width}, the input width of {name}, which {self.group} does not"
                raise SettingsError(self.name, setting, got, f"{allowed}, unless short_last_group=true")

    @property
    def group(self) -> int:
        """Columns of a group, -1: the whole row."""
        return self.group_size or FORMATS[self.format].group

    def bits_per_weight(self, width: int) -> float:
        """Logical bits of one weight in rows of `width`: code and scale."""
        book, _, scales = FORMATS[self.format]
        scale = torch.finfo(getattr(torch, self.scale_dtype)).bits if scales == "plain" else 8
        if book is None:  # scales in float32, or in 8 bits and float32 for 256 of these
            return 4 + (8 + 32 / 256 if self.double_quant else 32) / self.group
        groups = 1 if self.group == -1 else ceil(width / self.group)
        return book.bits + groups * scale / width

    def round_to_nearest(self, weight: Tensor) -> Codes:
        """weight (out, in) float32 -> codes, each weight rounded by itself."""
        book, _, scales = FORMATS[self.format]
        if book is None:
            return nf4(weight, self.group, self.double_quant)
        g = weight.shape[1] if self.group == -1 else self.group
        groups = in_groups(weight, g)
        absmax = groups.abs().amax(-1)
        scale = {"plain": self.plain_scale, "global": global_scale, "power": power_scale}[scales](absmax, book)
        numbers = (scale if isinstance(scale, Tensor) else scale.materialise()).float()
        codes = book.nearest(groups / numbers.unsqueeze(-1)).flatten(1)[:, : weight.shape[1]]
        return Codes.of(codes, book, Rows(self.group), scale)

    def plain_scale(self, absmax: Tensor, book: Minifloat) -> Tensor:
        """absmax (out, groups) -> scales as they are stored."""
        return as_stored(absmax / book.largest, getattr(torch, self.scale_dtype))


def global_scale(absmax: Tensor, book: Minifloat) -> Codes:
    """absmax (out, groups) -> E4M3 scales under the smallest power of two under which none of them saturates."""
    wanted = absmax / book.largest
    factor = power_above(wanted.amax() / E4M3.largest).clamp(min=2.0**-126)
    # A scale that would be cast to zero becomes the smallest number: its group may then be rounded, not divided by zero.
    codes = E4M3.nearest(wanted / factor).clamp(min=1)
    return Codes.of(codes, E4M3, Rows(-1), factor)


def power_scale(absmax: Tensor, book: Minifloat) -> Codes:
    """absmax (out, groups) -> powers of two."""
    codes = PowerOfTwo().nearest(power_above(absmax / book.limit))
    return Codes.of(codes, PowerOfTwo(), Rows(-1), torch.ones((), device=absmax.device))
