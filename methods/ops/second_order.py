"""What second-order methods make of a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """H (n, n) -> U upper triangular with U^T U = (H + d * mean(diag H) * I)^-1, and d: `damping`, doubled until U exists.

    None where even d > 1 does not help. With J the reversal of all indices and J H J = L L^T, U is the inverse of J L J.
    """
    eye, mean = torch.eye(len(gram), dtype=gram.dtype, device=gram.device), gram.diagonal().mean()
    while damping <= 1:
        lower, info = torch.linalg.cholesky_ex((gram + damping * mean * eye).flip(0, 1))
        if info.item() == 0:
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True), damping
        damping *= 2
    return None, damping
