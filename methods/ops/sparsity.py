"""Which weights may go: any of them, or all but N of every M consecutive columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pare.methods.parts.formula import Formula
from pare.methods.parts.masked import Kept, Masked, NofM
from pare.methods.settings import SettingsError

FEW = 8
"""Numbers among which the smallest are found by comparing each with each."""


class Pattern(NamedTuple):
    kept: int
    of: int


PATTERNS = {"unstructured": None, "2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}
"""By the name that settings give them. Those of N:M are what hardware and its kernels know."""


def pattern_of(name: str) -> Pattern | None:
    """None: unstructured."""
    return PATTERNS[name]


def check_pattern(method: Any, pattern: str, sparsity: float, widths: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Raises SettingsError for an unknown pattern, one of another sparsity, or widths (out, in) that it does not divide."""
    if pattern not in PATTERNS:
        raise SettingsError(method.name, "pattern", pattern, f"one of {', '.join(PATTERNS)}")
    found = PATTERNS[pattern]
    if found is None:
        return
    if sparsity != 1 - found.kept / found.of:
        raise SettingsError(method.name, "sparsity", sparsity, f"{1 - found.kept / found.of:g} with pattern={pattern}")
    for name, (_, columns) in (widths or {}).items():
        if columns % found.of:
            allowed = f"unstructured for {name}, which has {columns} columns that {found.of} does not divide"
            raise SettingsError(method.name, "pattern", pattern, allowed)


def count(n: int, sparsity: float) -> int:
    """floor(n * sparsity), of the number that was meant: 0.29 of 100 are 29, whatever binary fractions make of it."""
    return int(n * sparsity + 1e-9 * n)


def all_but_smallest(score: Tensor, dropped: int) -> Tensor:
    """score (..., n) -> bool (..., n): false for the `dropped` smallest along the last dimension, of equal ones the first."""
    n = score.shape[-1]
    if dropped == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if n <= FEW:  # every one against every other: less than sorting so short runs takes
        runs = score.unbind(-1)
        smaller = [sum((a <= b if i < j else a < b).int() for i, a in enumerate(runs)) for j, b in enumerate(runs)]
        return torch.stack([count >= dropped for count in smaller], -1)
    keep = score > score.kthvalue(dropped, dim=-1, keepdim=True).values
    if int(keep.sum()) == keep.numel() // n * (n - dropped):
        return keep
    order = score.argsort(dim=-1, stable=True)[..., :dropped]  # equal ones on the edge
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order, False)


def part_of(keep: Tensor, values: Tensor, pattern: Pattern | None) -> Kept:
    """keep (out, in) bool, values (kept,) row by row -> the part that says so in the fewest bytes for the pattern."""
    return Masked.of(keep, values) if pattern is None else NofM.of(keep, values, pattern.kept, pattern.of)


def left_by(formula: Formula | None) -> Kept | None:
    """What an earlier stage has left of a weight, where it has pruned and nothing was added since; None elsewhere."""
    if formula is None or formula.op != "replace" or len(formula.parts) != 1 or formula.transforms:
        return None
    part = formula.parts[0]
    return part if isinstance(part, Kept) else None
