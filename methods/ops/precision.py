"""Arithmetic that must not be rounded behind our back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 in float32: no TensorFloat-32 on a GPU, no bfloat16 passes on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def narrowest(values: Tensor) -> Tensor:
    """The same float32 numbers in the narrowest of bfloat16, float16 and float32 that holds each of them exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return values.to(dtype)
    return values
