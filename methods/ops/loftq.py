"""LoftQ: codes and low-rank adapters that start as an answer to each other.

    Q_t = q(W - s B_{t-1} A_{t-1}),    s B_t A_t = the best of that rank for W - Q_t,    B_0 A_0 = 0

Source: Li et al. (2023), "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659, algorithm 1.
Differs from the paper: the scale s of the adapters is part of it, so that the start does not depend on alpha.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pare.methods.ops.bnb4bit import codes_of


def fitted(
    linear: nn.Linear, rank: int, scale: float, steps: int, quantise: Callable[[nn.Linear], nn.Module]
) -> tuple[nn.Module, Tensor, Tensor]:
    """(4-bit linear, A (rank, in), B (out, rank)). The weight of `linear` is used up.

    quantise: as `bnb4bit.quantise_linear` does. steps: >= 1.
    """
    weight = linear.weight.detach().float()
    codes, a, b = quantise(linear), weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    for step in range(steps):
        if step:
            linear.weight.data = (weight - scale * b.to(weight.device) @ a.to(weight.device)).to(linear.weight.dtype)
            codes = quantise(linear)
        decoded = codes_of(codes.weight).materialise()
        a, b = best_factors(weight.to(decoded.device) - decoded, rank, scale)
    return codes, a, b


def best_factors(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), of equal norms, of which scale * B A is nearest to the matrix (Eckart and Young)."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
